#include "cpu/float_product.h"

#include <algorithm>
#include <utility>

#include "cpu/parallel.h"

namespace burnish {
namespace {

constexpr int64_t kPackedBytes = int64_t{128} << 10;  // of W, packed together: they stay in L2
constexpr int64_t kCopied = 8192;  // elements of rows of W that are copied before they are packed: they stay in L1
constexpr int64_t kSumBytes = 64 << 10;  // of rows of X, for more columns of W than one block
constexpr int64_t kLongest = 4096;       // elements of a column that are: sums in one go lose little up to there
constexpr int64_t kPackedWhole = int64_t{256} << 10;
constexpr int64_t kRowsByRows = 24;
constexpr int64_t kRowBlock = 512;  // rows that meet a packed panel: x's chunk of them stays in L2
constexpr int64_t kPartialBytes = int64_t{4} << 20;

// The depth of W that is packed and summed in one go: whole bytes of a bitmap and of dropout's bits. It depends neither
// on how W lies nor on which columns a thread has, so sums do not: of the ranges of columns, only one that ends with W
// ends before kColumnBlock.
int64_t longest(Range columns, Format format) {
  const int64_t width = round_up(std::min(kColumnBlock, columns.end), 16);
  return std::min(kPackedBytes / (width * size_of(format)) / 8 * 8, kLongest);
}

// A piece of a term's depth, packed at once.
struct Step {
  const Term* term;
  Range depth;
};

std::vector<Step> steps_of(const std::vector<Term>& terms, Range columns) {
  std::vector<Step> steps;
  for (const Term& term : terms) {
    int64_t chunk = longest(columns, term.x.format);
    if (term.weight.compressed != nullptr) chunk = std::min(chunk, term.weight.compressed->longest(term.x.format));
    for (int64_t k = 0; k < term.depth; k += chunk) steps.push_back({&term, {k, std::min(k + chunk, term.depth)}});
    if (term.depth == 0 && &term == &terms.back() && steps.empty()) steps.push_back({&term, {0, 0}});
  }
  return steps;
}

// The memory that packing `columns` of a step reads.
Ahead memory_of(const Step& step, Range columns) {
  const Weight& weight = step.term->weight;
  if (weight.compressed != nullptr) return {};
  const int64_t size = size_of(weight.matrix.format);
  if (weight.transposed) {
    const Matrix from = weight.matrix.at(step.depth.begin, columns.begin);
    return {static_cast<const char*>(from.data), from.stride, (columns.size() * size + 63) / 64, step.depth.size()};
  }
  const Matrix from = weight.matrix.at(columns.begin, step.depth.begin);
  return {static_cast<const char*>(from.data), from.stride, (step.depth.size() * size + 63) / 64, columns.size()};
}

// Share i of n of some memory.
Ahead share(const Ahead& whole, int64_t i, int64_t n) {
  const int64_t first = whole.rows * i / n;
  return {whole.next + first * whole.stride, whole.stride, whole.lines, whole.rows * (i + 1) / n - first};
}

// Bytes of a step's panel.
int64_t packed_bytes(const Kernels& level, const Step& step) {
  return level.panel_columns * round_up(step.depth.size() * size_of(step.term->x.format), 4);
}

// Columns of the terms' W that are packed together for `rows` rows of X, whose sums of many columns would leave L2.
int64_t column_block(const std::vector<Term>& terms, int64_t rows) {
  int64_t wanted = kColumnBlock;
  for (const Term& term : terms) {
    const Weight& weight = term.weight;
    if (weight.compressed != nullptr && weight.transposed) wanted = std::max(wanted, weight.compressed->together());
  }
  const int64_t most = kSumBytes / (4 * kColumnBlock * std::max<int64_t>(1, rows)) * kColumnBlock;
  return std::clamp(most, kColumnBlock, wanted);
}

// W where it lies, or these elements of it in `kept`.
Matrix dense_part(const Kernels& level, const Weight& weight, Range depth, Range columns, const Block& kept) {
  const auto [row, column] = weight.transposed ? std::pair{depth, columns} : std::pair{columns, depth};
  if (weight.compressed != nullptr) {
    weight.compressed->take(level, row, column, kept);
  } else if (weight.dropout != nullptr) {
    level.take_rows(weight.matrix, row.begin, row.size(), column.begin, column.size(), weight.dropout, kept.matrix());
  } else {
    return weight.matrix.at(row.begin, column.begin);
  }
  return kept.matrix();
}

// The panels of `columns` for a step, one after the other, `panel_bytes` apart; `kept` is for a copy to pack from, of
// `part` of the depth where that is W's rows. Columns are copied from end to end, as memory likes it.
void pack(const Kernels& level, const Step& step, Range columns, char* panels, int64_t panel_bytes, const Block& kept,
          int64_t part) {
  const Weight& weight = step.term->weight;
  const int64_t depth = step.depth.size(), size = size_of(step.term->x.format);
  if (!weight.transposed || (weight.compressed == nullptr && weight.dropout == nullptr)) part = depth;
  for (int64_t k = 0; k < depth; k += part) {
    const Range here{step.depth.begin + k, step.depth.begin + std::min(k + part, depth)};
    const Matrix from = dense_part(level, weight, here, columns, kept);
    for (int64_t n = 0; n < columns.size(); n += level.panel_columns) {
      const int64_t count = std::min(level.panel_columns, columns.size() - n);
      char* to = panels + n / level.panel_columns * panel_bytes + k * size * round_up(count, level.lanes);
      if (weight.transposed) {
        level.pack_columns(from.at(0, n), count, here.size(), to);
      } else {
        level.pack_rows(from.at(n, 0), count, here.size(), to);
      }
    }
  }
}

// One short step whose whole W is packed before anything is multiplied: a few rows of y at a time, from end to end,
// which the memory likes better than a panel of all rows.
void add_product_by_rows(const Kernels& level, const Step& step, int64_t rows, Range columns, const Sink& y) {
  static thread_local Scratch scratch;
  const int64_t panels = ceil_div(columns.size(), level.panel_columns);
  const int64_t panel_bytes = packed_bytes(level, step);
  scratch.reserve(Scratch::bytes<char>(panels * panel_bytes));
  char* packed = scratch.take<char>(panels * panel_bytes);
  pack(level, step, columns, packed, panel_bytes, {}, 0);
  for (int64_t row = 0; row < rows; row += kRowsByRows) {
    const int64_t count = std::min(kRowsByRows, rows - row);
    level.multiply_panels(step.term->x.at(row, step.depth.begin), count, packed, panel_bytes, columns.size(),
                          step.depth.size(), y.at(row, columns.begin));
  }
}

}  // namespace

void add_products(const Kernels& level, const std::vector<Term>& terms, int64_t rows, Range columns, const Sink& sink,
                  const Dropout* dropout, int64_t mask_row) {
  static thread_local Scratch scratch;
  const std::vector<Step> steps = steps_of(terms, columns);
  if (steps.size() == 1 && terms[0].depth <= kNarrow && sink.y != nullptr && rows >= kRowsByRows && !dropout &&
      terms[0].weight.dropout == nullptr && terms[0].weight.compressed == nullptr &&
      packed_bytes(level, steps[0]) * ceil_div(columns.size(), level.panel_columns) <= kPackedWhole) {
    return add_product_by_rows(level, steps[0], rows, columns, sink);
  }
  const Format format = terms[0].x.format;
  const int64_t block = column_block(terms, rows), part = kCopied / block / 8 * 8;
  const int64_t packed = block / kColumnBlock * (kPackedBytes + 4 * kColumnBlock);  // a panel's rows are whole words
  const auto [kept_rows, kept_columns] =
      terms[0].weight.transposed ? std::pair{part, block} : std::pair{block, longest(columns, format)};
  scratch.reserve(Block::bytes(rows, block, Format::kFloat) + Scratch::bytes<char>(packed) +
                  Block::bytes(kept_rows, kept_columns, format));
  const Block tile = Block::take(scratch, rows, block, Format::kFloat);
  char* panels = scratch.take<char>(packed);
  const Block kept = Block::take(scratch, kept_rows, kept_columns, format);
  for (int64_t n = columns.begin; n < columns.end; n += block) {
    const Range here{n, std::min(n + block, columns.end)};
    Sink sums = sink.at(0, n);
    if (sink.y != nullptr) sums = tile.sums(false);
    for (size_t i = 0; i < steps.size(); ++i) {
      const Step& step = steps[i];
      const bool last = i + 1 == steps.size();
      const int64_t panel_bytes = packed_bytes(level, step);
      pack(level, step, here, panels, panel_bytes, kept, part);
      Ahead ahead;
      if (!last) {
        ahead = memory_of(steps[i + 1], here);
      } else if (here.end < columns.end) {
        ahead = memory_of(steps[0], {here.end, std::min(here.end + block, columns.end)});
      }
      Sink to = sums;
      if (last && sink.y != nullptr) {
        to = sink.at(0, n);
        to.sums = tile.floats(0);
        to.sums_stride = tile.stride / 4;
      }
      to.add = i > 0 || (sink.y == nullptr && sink.add);
      const int64_t count = ceil_div(here.size(), level.panel_columns);
      for (int64_t p = 0; p < count; ++p) {
        const int64_t from = p * level.panel_columns;
        level.multiply(step.term->x.at(0, step.depth.begin), rows, panels + p * panel_bytes,
                       std::min(level.panel_columns, here.size() - from), step.depth.size(), to.at(0, from),
                       share(ahead, p, count));
      }
      if (dropout != nullptr && step.term == &terms[0] && step.depth.end == step.term->depth) {
        level.drop_sums(sums.sums, sums.sums_stride, mask_row, rows, here.begin, here.size(), *dropout);
      }
    }
  }
  scratch.trim();
}

void add_products_parallel(const Kernels& level, const std::vector<Term>& terms, int64_t rows, int64_t columns,
                           const Sink& sink, const Dropout* dropout) {
  const auto some = [&](Range row, Range column) {
    std::vector<Term> below;
    for (const Term& term : terms) below.push_back(term.below(row.begin));
    add_products(level, below, row.size(), column, sink.at(row.begin, 0), dropout, row.begin);
  };
  const int64_t blocks = ceil_div(rows, kRowBlock), parts = ceil_div(columns, kColumnBlock);
  const auto row_range = [&](int64_t block) {
    return Range{block * kRowBlock, std::min((block + 1) * kRowBlock, rows)};
  };
  if (blocks >= 2 * num_threads()) {
    return parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) some(row_range(block), {0, columns});
    });
  }
  for (int64_t block = 0; block < blocks; ++block) {
    parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
      some(row_range(block), {begin * kColumnBlock, std::min(end * kColumnBlock, columns)});
    });
  }
}

Cut::Cut(int64_t rows, int64_t depth, int64_t columns) : rows(rows), depth(depth) {
  // a narrow W costs little to pack again: X's rows are then read whole, in streams that the processor follows
  const bool narrow = columns <= kNarrow && rows >= 2 * kNarrowRows;
  row_part = std::max<int64_t>(narrow ? kNarrowRows : 256, round_up((rows + 7) / 8, 6));
  const int64_t most = std::max<int64_t>(1, kPartialBytes / std::max<int64_t>(1, rows * columns * 4));
  const int64_t parts = narrow ? 1 : std::clamp<int64_t>(depth / 1024, 1, most);
  depth_part = std::max<int64_t>(round_up((depth + parts - 1) / parts, 64), 64);
}

int64_t Projection::bytes(int64_t rows, int64_t columns, Format format, bool transposed) {
  return Block::bytes(rows, columns, format) + (transposed ? Block::bytes(columns, rows, format) : 0);
}

Projection Projection::take(Scratch& scratch, int64_t rows, int64_t columns, Format format, bool transposed) {
  Projection made{Block::take(scratch, rows, columns, format), {nullptr, 0, format}};
  if (transposed) made.transposed = Block::take(scratch, columns, rows, format);
  return made;
}

void round_projection(const Kernels& level, const Block& sums, int64_t parts, int64_t rows, int64_t columns,
                      float factor, const Projection& to) {
  const Format format = to.rows.format;
  const auto some = [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      float* total = sums.floats(row);
      for (int64_t part = 1; part < parts; ++part) {
        level.add_floats(sums.floats(part * rows + row), columns, total);
      }
      level.convert(total, factor, columns, total, Format::kFloat);
      level.convert(total, 1.0f, columns, to.rows.row(row), format);
    }
    if (to.transposed.data == nullptr) return;
    const int64_t size = size_of(format);
    level.store_transposed(sums.floats(begin), sums.stride / 4, end - begin, columns,
                           into(to.transposed.row(0) + begin * size, to.transposed.stride / size, format));
  };
  parallel_for(0, rows, std::max<int64_t>(1, 32768 / std::max<int64_t>(1, columns * parts)), some);
}

void project(const Kernels& level, const Matrix& x, int64_t rows, int64_t depth, const Weight& weight, int64_t columns,
             const Dropout* dropout, float factor, const Projection& to) {
  static thread_local Scratch scratch;
  const Format format = to.rows.format;
  if (rows <= kDotRows && !weight.transposed && dropout == nullptr) {
    scratch.reserve(Block::bytes(rows, columns, Format::kFloat));
    const Block sums = Block::take(scratch, rows, columns, Format::kFloat);
    const int64_t grain = std::max<int64_t>(4, (int64_t{64} << 10) / std::max<int64_t>(1, depth * size_of(x.format)));
    parallel_for(0, columns, grain, [&](int64_t begin, int64_t end) {
      const DotTerm term{x, weight.matrix.at(begin, 0), depth};
      level.dot(&term, 1, rows, end - begin, sums.sums(false).at(0, begin));
    });
    return round_projection(level, sums, 1, rows, columns, factor, to);
  }
  const Cut cut(rows, depth, columns);
  scratch.reserve(Block::bytes(rows * cut.depth_parts(), columns, Format::kFloat));
  const Block sums = Block::take(scratch, rows * cut.depth_parts(), columns, Format::kFloat);
  parallel_for(0, cut.parts(), 1, [&](int64_t begin, int64_t end) {
    static thread_local Scratch copies;
    for (int64_t part = begin; part < end; ++part) {
      const Range row = cut.row_range(part), k = cut.depth_range(part);
      Matrix from = x.at(row.begin, k.begin);
      if (dropout != nullptr || x.format != format) {
        copies.reserve(Block::bytes(row.size(), k.size(), format));
        const Block copy = Block::take(copies, row.size(), k.size(), format);
        level.take_rows(x, row.begin, row.size(), k.begin, k.size(), dropout, copy.matrix());
        from = copy.matrix();
      }
      Weight some = weight;
      some.matrix = weight.transposed ? weight.matrix.at(k.begin, 0) : weight.matrix.at(0, k.begin);
      const int64_t above = part % cut.depth_parts() * rows + row.begin;
      add_products(level, {{from, some, k.size()}}, row.size(), {0, columns},
                   sums_of(sums.floats(above), sums.stride / 4, false));
    }
  });
  round_projection(level, sums, cut.depth_parts(), rows, columns, factor, to);
  scratch.trim();
}

Matrix in_format(const Kernels& level, const Matrix& x, int64_t rows, int64_t width, Format format, Scratch& storage) {
  if (format == x.format) return x;
  storage.reserve(Block::bytes(rows, width, format));
  const Block copy = Block::take(storage, rows, width, format);
  parallel_for(0, rows, std::max<int64_t>(1, 16384 / std::max<int64_t>(1, width)), [&](int64_t begin, int64_t end) {
    const Block part{copy.row(begin), copy.stride, format};
    level.take_rows(x, begin, end - begin, 0, width, nullptr, part.matrix());
  });
  return copy.matrix();
}

void scale_columns(const Kernels& level, const Matrix& dy, int64_t rows, const float* scale, int64_t N,
                   const Block& to) {
  parallel_for(0, rows, std::max<int64_t>(1, 16384 / N), [&](int64_t begin, int64_t end) {
    static thread_local Scratch scratch;
    scratch.reserve(Scratch::bytes<float>(N));
    auto* scaled = scratch.take<float>(N);
    for (int64_t row = begin; row < end; ++row) {
      level.slope_row(dy.at(row, 0).data, dy.format, nullptr, 0, scale, N, scaled);
      level.convert(scaled, 1.0f, N, to.row(row), to.format);
    }
  });
}

Matrix in_product_format(const Kernels& level, const Matrix& x, int64_t rows, int64_t width, Scratch& storage) {
  return in_format(level, x, rows, width, level.product_format(x.format), storage);
}

}  // namespace burnish

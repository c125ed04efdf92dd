// X W on one packed panel of columns.
//
// A microkernel multiplies MR rows of X by NV vectors of columns over the depth, with the sums in registers: 6 x 4 of
// AVX-512's 32 registers, or 6 x 2 of AVX2's 16. X is read where it lies, one element (or pair) broadcast at a time. A
// product that runs from L2 or L1 can bring the memory of the next one closer meanwhile (Ahead).
#include <utility>

#include "cpu/simd/element.h"
#include "cpu/simd/level.h"

namespace burnish::BURNISH_ISA {
namespace {

constexpr int kRows = 6;
constexpr int kSums = 4 * kRows;  // registers of sums
// steps that are summed in one go, where there are registers for two levels
constexpr int64_t kSumSteps = Vec::kLanes == 1 ? kShortSum : 512;
constexpr int64_t kClaimed = 3;      // passes ahead that lines of y are fetched, to be written
constexpr int64_t kColdDepth = 256;  // from which X's rows are worth a prefetch
constexpr int64_t kSummed = 64;      // columns that add_columns sums together
constexpr int kVectors = kPanelColumns / Vec::kLanes;

// Prefetches the lines of an Ahead one by one, in order.
class Walker {
 public:
  explicit Walker(const Ahead& ahead) : ahead_(ahead), left_(ahead.lines), lines_(ahead.lines * ahead.rows) {}
  int64_t lines() const { return lines_; }
  BURNISH_INLINE void step() {
    __builtin_prefetch(ahead_.next, 0, 2);
    ahead_.next += 64;
    if (--left_ == 0) {
      left_ = ahead_.lines;
      ahead_.next += ahead_.stride - 64 * ahead_.lines;
    }
  }

 private:
  Ahead ahead_;
  int64_t left_;
  int64_t lines_;
};

#if defined(__AVX512BF16__)
// Whole rows of bf16, two vectors an instruction and a store; false where that may be wrong: the instruction makes zero
// of subnormal numbers, so a zero in the result is done again with care. Sums of pairs alone are never subnormal.
template <class Element, int MR, int NV>
BURNISH_INLINE bool store_pairs(const Vec (&sum)[MR][NV], const Sink& sink, int64_t columns) {
  if constexpr (NV % 2 != 0) {
    return false;
  } else {
    if (columns < NV * 16) return false;
    const bool careful = Element::kDepth == 1 || sink.bias != nullptr || sink.add;
    const __m512i magnitude = _mm512_set1_epi16(0x7fff);
    __mmask32 zero = 0;
    BURNISH_UNROLL for (int m = 0; m < MR; ++m) {
      auto* y = static_cast<bf16*>(sink.y) + m * sink.y_stride;
      BURNISH_UNROLL for (int v = 0; v < NV; v += 2) {
        Vec low = sum[m][v], high = sum[m][v + 1];
        if (sink.bias != nullptr) {
          low = low + load(sink.bias + v * 16, 16);
          high = high + load(sink.bias + v * 16 + 16, 16);
        }
        const __m512bh both = _mm512_cvtne2ps_pbh(high.v, low.v);
        __m512i words;
        memcpy(&words, &both, sizeof words);
        if (careful) zero = static_cast<__mmask32>(zero | _mm512_testn_epi16_mask(words, magnitude));
        if (sink.stream) {
          _mm512_stream_si512(reinterpret_cast<__m512i*>(y + v * 16), words);
        } else {
          _mm512_storeu_si512(y + v * 16, words);
        }
      }
    }
    if (zero != 0 && sink.stream) end_stream();
    return zero == 0;
  }
}
#else
template <class Element, int MR, int NV>
BURNISH_INLINE bool store_pairs(const Vec (&)[MR][NV], const Sink&, int64_t) {
  return false;
}
#endif

template <class Element, int MR, int NV>
BURNISH_INLINE void finish(Vec (&sum)[MR][NV], const Sink& sink, int64_t columns) {
  BURNISH_UNROLL for (int m = 0; m < MR; ++m) {
    if (sink.add) {
      const float* there = sink.sums + m * sink.sums_stride;
      BURNISH_UNROLL for (int v = 0; v < NV; ++v) {
        sum[m][v] = sum[m][v] + load(there + v * Vec::kLanes, columns - v * Vec::kLanes);
      }
    }
    if (sink.y == nullptr) {
      float* to = sink.sums + m * sink.sums_stride;
      BURNISH_UNROLL for (int v = 0; v < NV; ++v) store(to + v * Vec::kLanes, sum[m][v], columns - v * Vec::kLanes);
    }
  }
  if (sink.y == nullptr) return;
  if (sink.y_format == Format::kBf16 && store_pairs<Element>(sum, sink, columns)) return;
  with_type(sink.y_format, [&](auto* type) __attribute__((always_inline)) {
    auto* y = static_cast<decltype(type)>(sink.y);
    BURNISH_UNROLL for (int v = 0; v < NV; ++v) {
      const int64_t from = v * Vec::kLanes;
      const Vec bias = sink.bias == nullptr ? Vec(0.0f) : load(sink.bias + from, columns - from);
      BURNISH_UNROLL for (int m = 0; m < MR; ++m) {
        const Vec value = sink.bias == nullptr ? sum[m][v] : sum[m][v] + bias;
        store(y + m * sink.y_stride + from, value, columns - from);
      }
    }
  });
}

// One step of k: a vector of W for each column vector, a broadcast of X for each row.
template <class Element, int MR, int NV, class Spread>
BURNISH_INLINE void step(Vec (&sum)[MR][NV], const char* x, int64_t x_stride, const char* panel, Spread spread) {
  typename Element::Weight weight[NV];
  BURNISH_UNROLL for (int v = 0; v < NV; ++v) weight[v] = Element::load_weight(panel + v * kVectorBytes);
  BURNISH_UNROLL for (int m = 0; m < MR; ++m) {
    const auto factor = spread(x + m * x_stride);
    BURNISH_UNROLL for (int v = 0; v < NV; ++v) Element::multiply_add(sum[m][v], weight[v], factor);
  }
}

// Where there are registers for it whatever the rows of a tile, of which sums must not depend, those of a long depth
// are formed in blocks, and the blocks added up: that keeps the rounding error near that of a short sum. Results in
// bf16 hide it.
template <class Element, int NV>
constexpr bool kTwoLevels = Element::kDepth == 1 && (Vec::kLanes == 1 || 2 * NV * kRows <= kSums);

template <class Element, int MR, int NV>
void tile(const char* x, int64_t x_stride, const char* panel, int64_t depth, Walker& walker, int64_t lines,
          const Sink& sink, int64_t columns) {
  constexpr int64_t kStep = Element::kDepth * sizeof(typename Element::Stored);  // bytes of x a step
  constexpr int64_t kPanelStep = NV * kVectorBytes;
  Vec sum[MR][NV];
  BURNISH_UNROLL for (int m = 0; m < MR; ++m) { BURNISH_UNROLL for (int v = 0; v < NV; ++v) sum[m][v] = Vec(0.0f); }
  const int64_t steps = depth / Element::kDepth;
  const int64_t every = lines > 0 && steps / lines > 0 ? steps / lines : 1;  // steps between two prefetches
  int64_t k = 0;
  if constexpr (kTwoLevels<Element, NV>) {
    Vec total[MR][NV];
    BURNISH_UNROLL for (int m = 0; m < MR; ++m) { BURNISH_UNROLL for (int v = 0; v < NV; ++v) total[m][v] = Vec(0.0f); }
    int64_t wait = 0;
    for (int64_t block = 0; block < steps; block += kSumSteps) {
      const int64_t end = steps - block < kSumSteps ? steps : block + kSumSteps;
      for (; k < end; ++k) {
        if (lines > 0 && --wait <= 0) {
          walker.step();
          --lines;
          wait = every;
        }
        step<Element>(sum, x + k * kStep, x_stride, panel + k * kPanelStep, Element::spread);
      }
      BURNISH_UNROLL for (int m = 0; m < MR; ++m) {
        BURNISH_UNROLL for (int v = 0; v < NV; ++v) {
          total[m][v] = total[m][v] + sum[m][v];
          sum[m][v] = Vec(0.0f);
        }
      }
    }
    BURNISH_UNROLL for (int m = 0; m < MR; ++m) { BURNISH_UNROLL for (int v = 0; v < NV; ++v) sum[m][v] = total[m][v]; }
  } else if (lines > 0) {
    // the steps between two prefetches in a loop of their own, free of branches
    for (int64_t line = 0; line < lines && k + every <= steps; ++line) {
      walker.step();
      for (const int64_t end = k + every; k < end; ++k) {
        step<Element>(sum, x + k * kStep, x_stride, panel + k * kPanelStep, Element::spread);
      }
    }
  }
  for (; k < steps; ++k) step<Element>(sum, x + k * kStep, x_stride, panel + k * kPanelStep, Element::spread);
  if (depth % Element::kDepth != 0) {
    step<Element>(sum, x + k * kStep, x_stride, panel + k * kPanelStep, Element::spread_last);
  }
  finish<Element, MR, NV>(sum, sink, columns);
}

using Tile = void (*)(const char*, int64_t, const char*, int64_t, Walker&, int64_t, const Sink&, int64_t);

template <class Element, int NV>
Tile tile_of(int64_t rows) {
  static constexpr Tile kTable[kRows] = {tile<Element, 1, NV>, tile<Element, 2, NV>, tile<Element, 3, NV>,
                                         tile<Element, 4, NV>, tile<Element, 5, NV>, tile<Element, 6, NV>};
  return kTable[rows - 1];
}

template <class Element, int... NV>
Tile tile_of(int64_t rows, int64_t vectors, std::integer_sequence<int, NV...>) {
  static constexpr Tile (*kTable[])(int64_t) = {tile_of<Element, NV + 1>...};
  return kTable[vectors - 1](rows);
}

}  // namespace

Format product_format(Format format) {
  return with_element(format, [](auto element) {
    return std::is_same_v<typename decltype(element)::Stored, float> ? Format::kFloat : Format::kBf16;
  });
}

void multiply(const Matrix& x, int64_t rows, const void* panel, int64_t columns, int64_t depth, const Sink& sink,
              const Ahead& ahead) {
  const bool streams = kStreams && sink.stream;
  with_element(x.format, [&](auto element) {
    using Element = decltype(element);
    const int64_t passes = (rows + kRows - 1) / kRows;
    const int64_t vectors = padded_columns(columns) / Vec::kLanes;
    Walker walker(ahead);
    const auto claimed = [&](int64_t pass) {
      return pass + kClaimed < passes ? rows * (pass + kClaimed) / passes : rows;
    };
    const bool reads_x = ahead.rows == 0 && depth >= kColdDepth;
    for (int64_t pass = 0; pass < passes; ++pass) {
      // equal passes: 16 rows as 6 + 5 + 5, not 6 + 6 + 4
      const int64_t first = rows * pass / passes, last = rows * (pass + 1) / passes;
      int64_t lines = walker.lines() * (pass + 1) / passes - walker.lines() * pass / passes;
      if (sink.y != nullptr && !streams) {  // claims the lines of y that a later pass writes
        const int64_t size = size_of(sink.y_format);
        for (int64_t row = pass == 0 ? last : claimed(pass); row < claimed(pass + 1); ++row) {
          const char* y = static_cast<const char*>(sink.y) + row * sink.y_stride * size;
          for (int64_t at = 0; at < columns * size; at += 64) __builtin_prefetch(y + at, 1, 3);
        }
      }
      if (reads_x) {  // nothing else to bring closer: X's rows of the next pass
        const int64_t next = pass + 1 < passes ? rows * (pass + 2) / passes : last;
        walker = Walker({static_cast<const char*>(x.data) + last * x.stride, x.stride,
                         (depth * size_of(x.format) + 63) / 64, next - last});
        lines = walker.lines();
      }
      const Tile run = tile_of<Element>(last - first, vectors, std::make_integer_sequence<int, kVectors>());
      run(static_cast<const char*>(x.data) + first * x.stride, x.stride, static_cast<const char*>(panel), depth, walker,
          lines, sink.at(first, 0), columns);
    }
  });
  if (streams) end_stream();
}

void multiply_panels(const Matrix& x, int64_t rows, const char* panels, int64_t panel_bytes, int64_t columns,
                     int64_t depth, const Sink& sink) {
  const bool streams = kStreams && sink.stream;
  with_element(x.format, [&](auto element) {
    using Element = decltype(element);
    const int64_t passes = (rows + kRows - 1) / kRows, size = size_of(sink.y_format);
    Walker nothing{{}};
    for (int64_t n = 0; n < columns; n += kPanelColumns, panels += panel_bytes) {
      const int64_t here = columns - n < kPanelColumns ? columns - n : kPanelColumns;
      const int64_t next = columns - n - here < kPanelColumns ? columns - n - here : kPanelColumns;
      for (int64_t row = 0; row < rows && !streams; ++row) {  // claims the lines of y that the next panel writes
        const char* y = static_cast<const char*>(sink.y) + (row * sink.y_stride + n + here) * size;
        for (int64_t at = 0; at < next * size; at += 64) __builtin_prefetch(y + at, 1, 3);
      }
      for (int64_t pass = 0; pass < passes; ++pass) {
        const int64_t first = rows * pass / passes, last = rows * (pass + 1) / passes;
        const Tile run = tile_of<Element>(last - first, padded_columns(here) / Vec::kLanes,
                                          std::make_integer_sequence<int, kVectors>());
        run(static_cast<const char*>(x.data) + first * x.stride, x.stride, panels, depth, nothing, 0, sink.at(first, n),
            here);
      }
    }
  });
  if (streams) end_stream();
}

void add_floats(const float* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; i += Vec::kLanes) {
    store(to + i, load(to + i, count - i) + load(from + i, count - i), count - i);
  }
}

void add_columns(const Matrix& x, int64_t rows, int64_t columns, double* sums) {
  with_type(x.format, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for (int64_t n = 0; n < columns; n += kSummed) {
      const int64_t count = columns - n < kSummed ? columns - n : kSummed;
      double total[kSummed] = {};
      for (int64_t row = 0; row < rows; ++row) {
        float values[kSummed] = {};
        const auto* from = static_cast<const T*>(x.at(row, n).data);
        for (int64_t i = 0; i < count; i += Vec::kLanes) store(values + i, load(from + i, count - i), count - i);
        for (int64_t i = 0; i < kSummed; ++i) total[i] += static_cast<double>(values[i]);
      }
      for (int64_t i = 0; i < count; ++i) sums[n + i] += total[i];
    }
  });
}

void convert(const float* from, float factor, int64_t count, void* to, Format format) {
  with_type(format, [&](auto* type) {
    auto* out = static_cast<decltype(type)>(to);
    for (int64_t i = 0; i < count; i += Vec::kLanes) {
      store(out + i, load(from + i, count - i) * Vec(factor), count - i);
    }
  });
}

}  // namespace burnish::BURNISH_ISA

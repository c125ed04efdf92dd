// sparse_linear in CUDA C++ for at most 8 rows of x: streams bitmap and kept values once, as fast as memory gives them.
//
//   Stream           a warp's rings of values and bitmap
//   keep_x           x into shared memory
//   multiply_word    a lane's 32 columns of a step; finish_channel stores what the lanes summed
//   sparse_linear    checks a call and chooses
//
// A warp takes neighbouring channels, whose values are one stream, whatever the channels' lengths. Its step is 1024
// columns of one channel: each lane has a word of the bitmap, 32 columns, and finds by a scan of the words' counts
// where in the stream its values begin. It then goes through its bits from the highest, two at a time for 16-bit
// values, so that a step takes as long as its fullest word: 23 bits of 32 at half the weights, 8 at a tenth. Bits alone
// are never worked on, so a sparser weight costs less, as it does in bytes.
//
//   stream   a ring of 16-byte units in shared memory, by cp.async, always filled to the last free unit: 4 KB of a warp
//            are under way or waiting, 128 KB of a multiprocessor, where 15 KB would cover the latency
//   bitmap   a ring of kAhead steps beside it; a lane reads back the word that it copied
//   x        in shared memory, once for a block, as words [1024 columns][bit][lane] of one fp32 or two 16-bit rows. All
//            lanes read their own column, each a different bit, from 32 different banks
//
// Shared memory is the limit beside memory. A word of two values is a load of about three passes, because lanes begin
// anywhere, and two loads of x without conflicts: by the counters 50 passes for a step at half the weights, 20 columns
// a cycle, where a multiprocessor's share of an H100's bandwidth brings 14; at a tenth of them 13 passes, 77 columns
// where it brings 46. From four rows of x on, multiplying takes longer than that.
//
// Where x has an infinity or a NaN, which a zero does not take away, the columns between the bits are multiplied as
// well, by zero.
//
// Sums are fp32, in an order that the pattern alone decides.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <type_traits>

#include "check.h"
#include "cuda/format.cuh"
#include "cuda/launch.cuh"
#include "cuda/operand.cuh"
#include "cuda/ptx.cuh"
#include "cuda/word.cuh"
#include "math/pack.h"
#include "rows.h"

namespace burnish {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kMaxRows = 8;
constexpr int64_t kMaxXBytes = 64 << 10;   // of x in shared memory: burnish/ops/sparse_linear.py knows both
constexpr int64_t kMaxElements = 1 << 30;  // of one warp's channels, so that 32 bits count them
constexpr int kSpan = 1024;                // columns of a step: 32 for each lane
constexpr int kAhead = 4;                  // steps
constexpr int kMostWarps = 16;             // of a block: two blocks fill a multiprocessor

struct Problem {
  Operand x;
  const unsigned char* values;
  const uint32_t* bitmap;     // [channels, row_words]
  const int64_t* row_starts;  // [channels + 1]
  const void* bias;           // [channels], or null
  void* y;                    // [rows, channels]
  int64_t count;              // of values
  int64_t channels;
  int row_words;
  int spans;
  int each;  // channels of a warp
  Format bias_format;
};

// kRows: of x. Rows of 16-bit types share words by two.
template <class T_, int kRows_>
struct Shape {
  using T = T_;
  static constexpr int kRows = kRows_;
  static constexpr int kPerWord = Word<T>::kElements;
  static constexpr int kWords = (kRows + kPerWord - 1) / kPerWord;  // of a column of x
  static constexpr int kUnits = 256 * (2 / kPerWord);  // of the ring: a step uses at most half of them and one more
  static constexpr size_t kSpanBytes = kSpan * kWords * sizeof(uint32_t);
  static constexpr size_t kWarpBytes = kUnits * sizeof(Bytes16) + kAhead * 32 * sizeof(uint32_t);
};

// What a warp fetches or multiplies next.
struct Step {
  int64_t channel;
  int span;

  __device__ void advance(int spans) {
    if (++span == spans) {
      span = 0;
      ++channel;
    }
  }
};

// The warp's rings. Units and elements are counted from the unit in which its values begin.
template <class S>
struct Stream {
  using T = typename S::T;
  using Element = std::conditional_t<sizeof(T) == 2, uint16_t, uint32_t>;
  static constexpr int kInUnit = 16 / sizeof(T);

  const Problem& p;
  Bytes16* units;
  uint32_t* words;  // [kAhead][32] of the bitmap
  int lane;
  int64_t end_channel;
  uint64_t policy;
  const unsigned char* data;  // the first unit
  int64_t bytes;              // from there to the end of all values
  int all;                    // units of the warp
  int position;               // the next step's first element
  int filled = 0;             // units

  __device__ Stream(const Problem& p, Bytes16* units, uint32_t* words, int64_t channel, int64_t end_channel)
      : p(p),
        units(units),
        words(words),
        lane(static_cast<int>(threadIdx.x % 32)),
        end_channel(end_channel),
        policy(evict_first_policy()) {
    // within the values whatever row_starts says
    const int64_t first = clamped(load(p.row_starts + channel), 0, p.count);
    const int64_t last =
        clamped(load(p.row_starts + end_channel), first, first + (end_channel - channel) * int64_t{kSpan} * p.spans);
    const int64_t unit = first / kInUnit;
    data = p.values + unit * 16;
    bytes = p.count * static_cast<int64_t>(sizeof(T)) - unit * 16;
    position = static_cast<int>(first % kInUnit);
    all = units_to(position + static_cast<int>(clamped(last, first, p.count) - first));
  }

  __device__ static int64_t clamped(int64_t value, int64_t low, int64_t high) {
    return value < low ? low : value > high ? high : value;
  }
  __device__ static int units_to(int element) { return (element + kInUnit - 1) / kInUnit; }

  __device__ void fetch_bitmap(const Step& step, int slot) const {
    const int word = step.span * 32 + lane;
    const bool inside = step.channel < end_channel && word < p.row_words;
    copy_async<4>(words + slot * 32 + lane, p.bitmap + step.channel * p.row_words + word, inside);
  }

  // Starts the copies of all units that there is room for.
  __device__ void fetch_values() {
    const int room = position / kInUnit + S::kUnits, target = room < all ? room : all;
    for (int unit = filled + lane; unit < target; unit += 32) {
      Bytes16* slot = units + unit % S::kUnits;
      const unsigned char* from = data + int64_t{unit} * 16;
      const int64_t left = bytes - int64_t{unit} * 16;
      if (left >= 16) {
        copy_async16(slot, from, true, policy);
      } else {
        store(slot, by_elements<Element>({from, 0, 1, static_cast<int>(left), false}, 0, 0, static_cast<int>(left)));
      }
    }
    filled = filled > target ? filled : target;
  }

  // The word at `index`, which holds elements kPerWord index and on.
  __device__ uint32_t word(int index) const {
    return load(reinterpret_cast<const uint32_t*>(units) + index % (S::kUnits * 4));
  }
};

// Whether a float is an infinity or a NaN.
__device__ bool has_no_end(float value) { return (float_bits(value) & 0x7f800000u) == 0x7f800000u; }

// x into shared memory: lanes take 16 bytes each of their 32 columns, and store columns of the same number together.
// Returns whether the lane found infinities or NaNs.
template <class S>
__device__ bool keep_x(const Problem& p, uint32_t* kept) {
  using T = typename S::T;
  constexpr int kColumns = 16 / sizeof(T), kUnitsOfLane = 32 / kColumns;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const auto unit = [&](int row, int byte) {
    using Element = std::conditional_t<sizeof(T) == 2, uint16_t, uint32_t>;
    if (!p.x.aligned) return by_elements<Element>(p.x, row, byte, p.x.width);
    const unsigned char* from = p.x.data + row * p.x.stride + byte;
    return row < p.x.rows && byte < p.x.width ? load(reinterpret_cast<const Bytes16*>(from)) : Bytes16{};
  };
  bool special = false;
  const auto keep = [&](uint32_t* to, uint32_t columns) {
#pragma unroll
    for (int i = 0; i < S::kPerWord; ++i) special |= has_no_end(Word<T>::element(columns, i));
    store(to, columns);
  };
  const int all = p.spans * S::kWords * kUnitsOfLane;
  for (int i = static_cast<int>(threadIdx.x / 32); i < all; i += static_cast<int>(blockDim.x / 32)) {
    const int span = i / (S::kWords * kUnitsOfLane), word = i / kUnitsOfLane % S::kWords, part = i % kUnitsOfLane;
    const int byte = (span * kSpan + lane * 32) * static_cast<int>(sizeof(T)) + part * 16;
    uint32_t* to = kept + ((span * S::kWords + word) * 32 + part * kColumns) * 32 + lane;
    const Bytes16 even = unit(word * S::kPerWord, byte);
    if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (int j = 0; j < 4; ++j) keep(to + j * 32, even.word[j]);
    } else {
      const Bytes16 odd = S::kRows > 1 ? unit(word * 2 + 1, byte) : Bytes16{};
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        keep(to + j * 32, prmt(even.word[j / 2], odd.word[j / 2], j % 2 == 0 ? 0x5410 : 0x7632));
      }
    }
  }
  return special;
}

// sum[row] += value * x[row] of the lane's column number `bit`; x: of the span, at the lane.
template <class S>
__device__ void multiply_column(float (&sum)[S::kRows], float value, const uint32_t* x, int bit) {
#pragma unroll
  for (int w = 0; w < S::kWords; ++w) {
    const uint32_t word = load(x + (w * 32 + bit) * 32);
#pragma unroll
    for (int i = 0; i < S::kPerWord; ++i) {
      const int row = w * S::kPerWord + i;
      if (row < S::kRows) sum[row] = fmaf(value, Word<typename S::T>::element(word, i), sum[row]);
    }
  }
}

// The lane's columns of a step, from the highest; `last` is its last value's number in the stream.
template <class S>
__device__ void multiply_word(float (&sum)[S::kRows], const Stream<S>& stream, uint32_t bits, int last,
                              const uint32_t* x) {
  using T = typename S::T;
  if constexpr (sizeof(T) == 4) {
    for (; bits != 0; --last) {
      const int bit = highest_bit(bits);
      bits ^= 1u << bit;
      multiply_column<S>(sum, bits_float(stream.word(last)), x, bit);
    }
  } else {
    // two values an iteration, the higher in the upper half: a word of the stream, or the halves of two
    const bool whole = last % 2 != 0;
    const uint32_t selector = whole ? 0x7654 : 0x5432;
    int index = last / 2;
    uint32_t upper = bits != 0 ? stream.word(index) : 0;
    while (bits != 0) {
      const int first = highest_bit(bits);
      bits ^= 1u << first;
      const int second = highest_bit(bits);
      const uint32_t rest = bits != 0 ? bits ^ 1u << second : 0;
      // only where its values are this lane's: what lies before may be on its way already
      const uint32_t lower = (whole ? rest : bits) != 0 ? stream.word(--index) : 0;
      const uint32_t pair = prmt(lower, upper, selector);
      multiply_column<S>(sum, Word<T>::element(pair, 1), x, first);
      if (bits != 0) multiply_column<S>(sum, Word<T>::element(pair, 0), x, second);
      bits = rest;
      upper = lower;
    }
  }
}

// Rounds and stores a channel's sums over the lanes, and clears them.
template <class S>
__device__ void finish_channel(const Problem& p, int64_t channel, float (&sum)[S::kRows]) {
  using T = typename S::T;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const float bias = p.bias != nullptr ? load_as_float(p.bias, channel, p.bias_format) : 0.0f;
#pragma unroll
  for (int row = 0; row < S::kRows; ++row) {
    float total = sum[row];
#pragma unroll
    for (int bits = 16; bits > 0; bits /= 2) total += shuffle_xor(kFullWarp, total, bits);
    if (p.bias != nullptr) total += bias;
    if (lane == row && row < p.x.rows) store(static_cast<T*>(p.y) + row * p.channels + channel, from_float<T>(total));
    sum[row] = 0;
  }
}

template <class S>
__global__ void __launch_bounds__(32 * kMostWarps, 2) sparse_linear_fwd_kernel(Problem p) {
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  const int warps = static_cast<int>(blockDim.x / 32);
  Bytes16* rings = shared_memory<Bytes16>();
  uint32_t* words = reinterpret_cast<uint32_t*>(rings + warps * S::kUnits);
  uint32_t* specials = words + warps * kAhead * 32;  // of each warp
  uint32_t* x = specials + 32;

  const int64_t first = (int64_t{blockIdx.x} * warps + warp) * p.each;
  const int64_t begin = first < p.channels ? first : p.channels;
  const int64_t end = begin + p.each < p.channels ? begin + p.each : p.channels;
  Stream<S> stream(p, rings + warp * S::kUnits, words + warp * kAhead * 32, begin, end);
  Step ahead{begin, 0};
  stream.fetch_values();
#pragma unroll
  for (int i = 0; i < kAhead; ++i) {
    stream.fetch_bitmap(ahead, i);
    copy_async_commit();
    ahead.advance(p.spans);
  }
  const bool special_here = vote_any(kFullWarp, keep_x<S>(p, x));
  if (lane == 0) store(specials + warp, special_here ? 1u : 0u);
  __syncthreads();
  const bool special = vote_any(kFullWarp, lane < warps && load(specials + lane) != 0);

  int ready[kAhead];  // units that are there when the next steps begin
#pragma unroll
  for (int i = 0; i < kAhead; ++i) ready[i] = stream.filled;
  float sum[S::kRows] = {};
  int slot = 0;
  for (Step at{begin, 0}; at.channel < end;) {
    copy_async_wait<kAhead - 1>();
    const uint32_t bits = load(stream.words + slot * 32 + lane);
    const int own = popcount(bits);
    int counted = own;  // of the lanes up to this one
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const int below = shuffle_up(kFullWarp, counted, static_cast<unsigned>(distance));
      if (lane >= distance) counted += below;
    }
    const int next = stream.position + shuffle(kFullWarp, counted, 31);
    if (Stream<S>::units_to(next) > ready[0]) copy_async_wait<0>();
    __syncwarp();
    const uint32_t* columns = x + at.span * S::kWords * kSpan + lane;
    multiply_word<S>(sum, stream, bits, stream.position + counted - 1, columns);
    if (special) {
      for (int bit = 0; bit < 32; ++bit) {
        if ((bits >> bit & 1) == 0) multiply_column<S>(sum, 0.0f, columns, bit);
      }
    }
    __syncwarp();
    stream.position = next;

    stream.fetch_bitmap(ahead, slot);
    stream.fetch_values();
    copy_async_commit();
#pragma unroll
    for (int i = 0; i + 1 < kAhead; ++i) ready[i] = ready[i + 1];
    ready[kAhead - 1] = stream.filled;
    ahead.advance(p.spans);
    slot = slot + 1 == kAhead ? 0 : slot + 1;
    if (at.span + 1 == p.spans) finish_channel<S>(p, at.channel, sum);
    at.advance(p.spans);
  }
}

template <class S>
void start(Problem p, const Tensor& x) {
  const DeviceLimits limits = device_limits(x.get_device_index());
  constexpr int kReserved = 1024;  // what the system takes of a multiprocessor's shared memory for each block
  const int64_t kept = p.spans * static_cast<int64_t>(S::kSpanBytes) + 32 * static_cast<int64_t>(sizeof(uint32_t));
  const int64_t room = (limits.shared_memory - kReserved - kept) / static_cast<int64_t>(S::kWarpBytes);
  const int64_t warps = std::min<int64_t>(kMostWarps, std::min(room, p.channels));
  const int64_t shared = kept + warps * static_cast<int64_t>(S::kWarpBytes);
  const int64_t blocks =
      limits.multiprocessors * std::clamp<int64_t>(limits.shared_memory / (shared + kReserved), 1, 2);
  const int64_t each = (p.channels - 1) / (blocks * warps) + 1;
  BURNISH_CHECK(each * p.spans * kSpan <= kMaxElements, "sparse_linear.native: N is ", p.channels, " and K ",
                p.x.width / static_cast<int>(sizeof(typename S::T)), ", more than a warp counts");
  p.each = static_cast<int>(each);
  const dim3 grid(static_cast<unsigned>((p.channels - 1) / (each * warps) + 1));
  launch(sparse_linear_fwd_kernel<S>, grid, dim3(static_cast<unsigned>(32 * warps)), static_cast<size_t>(shared),
         current_stream(x.get_device_index()), p);
}

template <class T>
void start_rows(const Problem& p, const Tensor& x) {
  if (p.x.rows == 1) return start<Shape<T, 1>>(p, x);
  if (p.x.rows == 2) return start<Shape<T, 2>>(p, x);
  if (p.x.rows <= 4) return start<Shape<T, 4>>(p, x);
  return start<Shape<T, 8>>(p, x);
}

// Bytes of shared memory that x takes: rows are 1, 2, 4 or 8, and of 16-bit types two share a word.
int64_t kept_bytes(int64_t rows, int64_t spans, int64_t element) {
  int64_t padded = 1;
  while (padded < rows) padded *= 2;
  return spans * kSpan * 4 * (element == 4 ? padded : (padded + 1) / 2);
}

Tensor sparse_linear(const Tensor& x, const Tensor& values, const Tensor& bitmap, const Tensor& row_starts,
                     const std::optional<Tensor>& bias) {
  constexpr const char* kOp = "sparse_linear";
  BURNISH_CHECK(x.dim() >= 1, "sparse_linear.native: x is a scalar, expected [..., K]");
  const ScalarType type = x.scalar_type();
  format_of(type, kOp, "x");
  const DeviceGuard guard(x.get_device_index());
  const Rows rows = as_rows(x);
  const int64_t channels = row_starts.numel() - 1, element = type == ScalarType::Float ? 4 : 2;
  const int64_t row_bytes = round_up(rows.width, 64) / 8, spans = std::max<int64_t>(1, (rows.width - 1) / kSpan + 1);
  BURNISH_CHECK(rows.count <= kMaxRows, "sparse_linear.native: x has ", rows.count, " rows, expected at most ",
                kMaxRows);
  BURNISH_CHECK(kept_bytes(rows.count, spans, element) <= kMaxXBytes, "sparse_linear.native: x has ", rows.count,
                " rows of ", rows.width, ", more than ", kMaxXBytes, " bytes of shared memory hold");
  BURNISH_CHECK(values.scalar_type() == type && values.dim() == 1, "sparse_linear.native: values are not [nnz] in ",
                "x's dtype");
  BURNISH_CHECK(row_starts.scalar_type() == ScalarType::Long && row_starts.dim() == 1 && channels >= 0,
                "sparse_linear.native: row_starts is not int64 [N + 1]");
  BURNISH_CHECK(bitmap.scalar_type() == ScalarType::Byte && bitmap.dim() == 2 && bitmap.size(0) == channels &&
                    bitmap.size(1) == row_bytes,
                "sparse_linear.native: bitmap is not uint8 [", channels, ", ", row_bytes, "]");
  BURNISH_CHECK(!bias || bias->numel() == channels, "sparse_linear.native: bias has not N = ", channels, " elements");
  Tensor y = torch::stable::new_empty(x, sizes_with_last(x, channels));
  if (y.numel() == 0) return y;

  const Tensor kept = aligned(values), bits = aligned(bitmap), starts = torch::stable::contiguous(row_starts);
  const std::optional<Tensor> offsets = bias ? std::optional(torch::stable::contiguous(*bias)) : std::nullopt;
  Problem p{};
  p.x = operand_of(rows, element);
  p.values = static_cast<const unsigned char*>(kept.const_data_ptr());
  p.bitmap = static_cast<const uint32_t*>(bits.const_data_ptr());
  p.row_starts = starts.const_data_ptr<int64_t>();
  p.bias = offsets ? offsets->const_data_ptr() : nullptr;
  p.bias_format = offsets ? format_of(offsets->scalar_type(), kOp, "bias") : Format::kFloat;
  p.y = y.mutable_data_ptr();
  p.count = values.numel();
  p.channels = channels;
  p.row_words = static_cast<int>(row_bytes / 4);
  p.spans = static_cast<int>(spans);
  switch (type) {
    case ScalarType::Float:
      start_rows<float>(p, x);
      break;
    case ScalarType::BFloat16:
      start_rows<bf16>(p, x);
      break;
    default:
      start_rows<fp16>(p, x);
  }
  return y;
}

}  // namespace
}  // namespace burnish

STABLE_TORCH_LIBRARY_IMPL(burnish, BURNISH_DEVICE_KEY, m) {
  m.impl("sparse_linear.native", TORCH_BOX(&burnish::sparse_linear));
}

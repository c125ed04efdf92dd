// int8_linear_pack and int8_linear_unpack on the CPU: see burnish/ops/int8_linear_pack.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <string>

#include "cpu/arguments.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"

namespace burnish {
namespace {

// Visits the vnni layout panel by panel in parallel: f(byte offset, n, k) for each byte, padding included.
template <class F>
void for_each_byte(int64_t N, int64_t K, const F& f) {
  const int64_t padded = round_up(K, kDepth);
  const int64_t panels = (N + kPanel - 1) / kPanel;
  parallel_for(0, panels, 4, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const int64_t width = panel_width(N, p);
      int64_t offset = p * kPanel * padded;
      for (int64_t k = 0; k < padded; k += kDepth) {
        for (int64_t c = 0; c < width; ++c) {
          for (int64_t i = 0; i < kDepth; ++i) f(offset++, p * kPanel + c, k + i);
        }
      }
    }
  });
}

Tensor int8_linear_pack(const Tensor& weight, const std::string& layout) {
  check_cpu("int8_linear_pack", "weight", weight);
  BURNISH_CHECK(weight.scalar_type() == ScalarType::Char, "int8_linear_pack: weight is ",
                dtype_name(weight.scalar_type()), ", expected int8");
  BURNISH_CHECK(weight.dim() == 2, "int8_linear_pack: weight has shape ", shape_text(weight), ", expected [N, K]");
  BURNISH_CHECK(layout == "vnni" || layout == "rows", "int8_linear_pack: layout is '", layout,
                "', expected 'vnni' or 'rows'");
  const int64_t N = weight.size(0), K = weight.size(1);
  const int64_t stride_n = weight.stride(0), stride_k = weight.stride(1);
  const auto* from = weight.const_data_ptr<int8_t>();
  if (layout == "rows") {
    const int64_t padded = round_up(K, kRowPadding);
    Tensor packed = torch::stable::new_empty(weight, {N, padded}, ScalarType::Char);
    auto* to = packed.mutable_data_ptr<int8_t>();
    parallel_for(0, N, 64, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        for (int64_t k = 0; k < K; ++k) to[n * padded + k] = from[n * stride_n + k * stride_k];
        std::fill_n(to + n * padded + K, padded - K, int8_t{0});
      }
    });
    return packed;
  }
  Tensor packed = torch::stable::new_empty(weight, {round_up(N, kGroup), round_up(K, kDepth)}, ScalarType::Byte);
  auto* to = packed.mutable_data_ptr<uint8_t>();
  advise_large_pages(to, packed.numel());
  for_each_byte(N, K, [&](int64_t offset, int64_t n, int64_t k) {
    const int value = n < N && k < K ? from[n * stride_n + k * stride_k] : 0;
    to[offset] = static_cast<uint8_t>(value + 128);
  });
  return packed;
}

Tensor int8_linear_unpack(const Tensor& packed, int64_t N, int64_t K) {
  BURNISH_CHECK(N >= 0 && K >= 0, "int8_linear_unpack: N is ", N, " and K is ", K, ", expected sizes");
  check_packed("int8_linear_unpack", "packed", packed, N, K, false);
  Tensor weight = torch::stable::new_empty(packed, {N, K}, ScalarType::Char);
  auto* to = weight.mutable_data_ptr<int8_t>();
  if (packed.scalar_type() == ScalarType::Char) {
    const auto* from = packed.const_data_ptr<int8_t>();
    for (int64_t n = 0; n < N; ++n) {
      std::copy_n(from + n * round_up(K, kRowPadding), K, to + n * K);
    }
    return weight;
  }
  const auto* from = packed.const_data_ptr<uint8_t>();
  for_each_byte(N, K, [&](int64_t offset, int64_t n, int64_t k) {
    if (n < N && k < K) to[n * K + k] = static_cast<int8_t>(from[offset] - 128);
  });
  return weight;
}

}  // namespace
}  // namespace burnish

STABLE_TORCH_LIBRARY_IMPL(burnish, CPU, m) {
  m.impl("int8_linear_pack", TORCH_BOX(&burnish::int8_linear_pack));
  m.impl("int8_linear_unpack", TORCH_BOX(&burnish::int8_linear_unpack));
}

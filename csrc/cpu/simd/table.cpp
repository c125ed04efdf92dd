// The level's entry in the table that isa.cpp picks from.
#include "cpu/isa.h"
#include "cpu/simd/level.h"

#define BURNISH_TEXT2(name) #name
#define BURNISH_TEXT(name) BURNISH_TEXT2(name)

namespace burnish {

template <>
const Kernels& kernels_of<Isa::BURNISH_ISA>() {
  using namespace BURNISH_ISA;
  static constexpr Kernels kTable{BURNISH_TEXT(BURNISH_ISA),
                                  quantize_row,
                                  int8_product,
                                  unpack_int8,
                                  slope_row,
                                  product_format,
                                  Vec::kLanes,
                                  kPanelColumns,
                                  pack_rows,
                                  pack_columns,
                                  turn,
                                  multiply,
                                  multiply_panels,
                                  dot,
                                  block_product,
                                  block_dot,
                                  int8_block_product,
                                  take_rows,
                                  drop_sums,
                                  store_transposed,
                                  add_floats,
                                  add_columns,
                                  convert,
                                  count_bits,
                                  expand_sparse24,
                                  expand_bitmap,
                                  compress_sparse24,
                                  compress_bitmap,
                                  sparse_dot,
                                  sparse_kept,
                                  sparse24_dot,
                                  sparse24_wide,
                                  sparse24_int8,
                                  kSparse24Offset,
                                  adagrad_step,
                                  adam_step,
                                  lamb_step,
                                  lamb_squares,
                                  lion_step,
                                  rmsprop_step,
                                  sgd_step,
                                  sum_squares,
                                  peak_int8,
                                  peak_fp32,
                                  peak_bf16,
                                  BURNISH_ISA::read};
  return kTable;
}

}  // namespace burnish

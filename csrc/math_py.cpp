// burnish._math: the functors of math/ as scalar functions of Python, for tests and for authors of new ones.
#include <pybind11/pybind11.h>

#include "math/activation.h"
#include "math/half.h"
#include "math/int8.h"
#include "math/pack.h"
#include "math/rounding.h"

namespace py = pybind11;
using namespace burnish;

namespace {

py::tuple words_of(const Philox& drawn) {
  return py::make_tuple(drawn.word[0], drawn.word[1], drawn.word[2], drawn.word[3]);
}

}  // namespace

PYBIND11_MODULE(_math, m) {
  m.doc() = "The functors of csrc/math as scalar functions; fp32 in, fp32 out.";
  m.def("bf16_bits", [](float x) { return from_float<bf16>(x).bits; }, "x rounded to bf16, as its 16 bits");
  m.def("fp16_bits", [](float x) { return from_float<fp16>(x).bits; }, "x rounded to fp16, as its 16 bits");
  m.def("bf16_value", [](uint16_t bits) { return to_float(bf16{bits}); }, "the value of 16 bits of bf16");
  m.def("fp16_value", [](uint16_t bits) { return to_float(fp16{bits}); }, "the value of 16 bits of fp16");
  m.def(
      "row_scale",
      [](float amax) {
        const RowScale rule = row_scale(magnitude_bits(amax));
        return py::make_tuple(rule.amax, rule.inverse, rule.scale);
      },
      "(amax, 127 / amax, amax / 127), amax floored at 2**-100");
  m.def("quantize", &quantize, "x in int8 for a row with this amax and inverse");
  m.def("vnni_offset", &vnni_offset, "byte of weight [n, k] in the packed channels x width buffer");
  m.def("exp2_held", &exp2_held<float>, "2**x, x held in [-126, 128]");
  m.def(
      "activate", [](float z, int code) { return activate(z, static_cast<Activation>(code)); },
      "the activation of that code");
  m.def(
      "activation_slope", [](float z, int code) { return activation_slope(z, static_cast<Activation>(code)); },
      "its derivative");
  m.def(
      "philox",
      [](uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint64_t key) {
        return words_of(philox(c0, c1, c2, c3, key));
      },
      "Philox4x32-10 of a counter and a key");
  m.def(
      "rounding_words",
      [](uint64_t seed, uint32_t tensor, uint64_t group) { return words_of(rounding_words(seed, tensor, group)); },
      "Philox4x32-7 of a group of elements of a tensor");
  m.def(
      "kept_bits",
      [](uint64_t seed, int64_t row, int64_t group, double p) {
        return kept_bits(dropout_words(seed, row, group), dropout_threshold(p));
      },
      "bit i: whether dropout with probability p keeps element 8 group + i of a row");
  m.def("dropout_factor", [](double p) { return dropout_factor(dropout_threshold(p)); }, "what kept elements get");
}

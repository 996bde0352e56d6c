// The tensors of a 4-bit weight, checked, as kernels take them: for the bindings of every op that reads one.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>

#include "nf4.h"

namespace peft_kernels {

// "torch.float32".
inline std::string torch_name(at::ScalarType type) { return "torch." + std::string(c10::getDtypeNames(type).first); }

// These raise ValueError with the messages of peft_kernels/formats/nf4.py.
inline bool check_quant_type(const char* op, c10::string_view quant_type, int64_t blocksize) {  // whether it is FP4
  TORCH_CHECK_VALUE(quant_type == "nf4" || quant_type == "fp4", op, ": quant_type is '", quant_type,
                    "'; expected 'nf4' or 'fp4'");
  TORCH_CHECK_VALUE(blocksize >= 32 && blocksize <= 4096 && (blocksize & (blocksize - 1)) == 0, op, ": blocksize is ",
                    blocksize, "; expected one of (32, 64, 128, 256, 512, 1024, 2048, 4096)");
  return quant_type == "fp4";
}

inline void check_vector(const char* op, const char* name, const at::Tensor& t, at::ScalarType dtype, int64_t length,
                         at::Device device) {
  const bool fits = t.scalar_type() == dtype && t.dim() == 1 && t.size(0) == length && t.device() == device;
  TORCH_CHECK_VALUE(fits && t.is_contiguous(), op, ": ", name, " is ", torch_name(t.scalar_type()), " ", t.sizes(),
                    " with strides ", t.strides(), " on ", t.device(), "; expected ", torch_name(dtype), " [", length, "], dense, on ", device);
}

inline Nf4Weight nf4_weight(const char* op, const at::Tensor& packed, const at::Tensor& absmax,
                            const std::optional<at::Tensor>& nested_absmax, const std::optional<at::Tensor>& nested_code,
                            const std::optional<at::Tensor>& nested_offset, c10::string_view quant_type, int64_t blocksize,
                            int64_t numel) {
  Nf4Weight w{};
  w.fp4 = check_quant_type(op, quant_type, blocksize), w.blocksize = blocksize, w.numel = numel;
  TORCH_CHECK_VALUE(numel >= 0, op, ": numel is ", numel, "; expected at least 0");
  const at::Device device = packed.device();
  const int64_t blocks = (numel + blocksize - 1) / blocksize;
  check_vector(op, "packed", packed, at::kByte, (numel + 1) / 2, device);
  w.packed = packed.const_data_ptr<uint8_t>();
  if (!nested_absmax) {
    check_vector(op, "absmax", absmax, at::kFloat, blocks, device);
    TORCH_CHECK_VALUE(!nested_code && !nested_offset, op, ": nested_absmax is None; expected all of nested_* or none");
    w.absmax = absmax.const_data_ptr<float>();
    return w;
  }
  TORCH_CHECK_VALUE(nested_code && nested_offset, op, ": ", nested_code ? "nested_offset" : "nested_code",
                    " is None; expected all of nested_* or none");
  check_vector(op, "absmax", absmax, at::kByte, blocks, device);
  check_vector(op, "nested_absmax", *nested_absmax, at::kFloat, (blocks + kNestedBlock - 1) / kNestedBlock, device);
  check_vector(op, "nested_code", *nested_code, at::kFloat, 256, device);
  check_vector(op, "nested_offset", *nested_offset, at::kFloat, 1, device);
  w.absmax8 = absmax.const_data_ptr<uint8_t>(), w.nested_absmax = nested_absmax->const_data_ptr<float>();
  w.nested_code = nested_code->const_data_ptr<float>(), w.nested_offset = nested_offset->const_data_ptr<float>();
  return w;
}

}  // namespace peft_kernels

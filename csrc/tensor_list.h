// Lists of tensors as kernels take them: what a tensor is, is read from PyTorch once, into a plain struct. A list has
// thousands, of which every check reads dtype, device and shape, and each question to PyTorch is a call; a
// std::vector<torch::stable::Tensor> also allocates once more for each.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <memory>
#include <numeric>
#include <utility>
#include <vector>

namespace burnish {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A tensor that somebody else owns, with the names of torch::stable::Tensor. Sizes are the tensor's own.
class TensorView {
 public:
  TensorView(const Tensor& tensor) : TensorView(tensor.get(), nullptr) {}

  // `like`, or null: a tensor whose dtype it may have.
  TensorView(AtenTensorHandle handle, const TensorView* like) : handle_(handle) {
    int64_t* sizes;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(handle, &dim_));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(handle, &sizes));
    TORCH_ERROR_CODE_CHECK(aoti_torch_is_contiguous(handle, &contiguous_));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(handle, &dtype_));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(handle, &device_type_));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(handle, &device_index_));
    sizes_ = sizes;
    using torch::stable::detail::from, torch::stable::detail::to;
    type_ = like != nullptr && like->dtype_ == dtype_ ? like->type_ : to<ScalarType>(from(dtype_));
  }

  operator Tensor() const {
    AtenTensorHandle owned;
    TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(handle_, &owned));
    return Tensor(owned);
  }

  ScalarType scalar_type() const { return type_; }
  bool is_cpu() const { return device_type_ == aoti_torch_device_type_cpu(); }
  int32_t get_device_index() const { return device_index_; }
  int64_t numel() const { return std::accumulate(sizes_, sizes_ + dim_, int64_t{1}, std::multiplies<>()); }
  int64_t dim() const { return dim_; }
  int64_t size(int64_t dim) const { return sizes_[dim]; }
  IntHeaderOnlyArrayRef sizes() const { return {sizes_, static_cast<size_t>(dim_)}; }
  IntHeaderOnlyArrayRef strides() const {
    int64_t* strides;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(handle_, &strides));
    return {strides, static_cast<size_t>(dim_)};
  }
  bool is_contiguous() const { return contiguous_; }

  bool on_device_of(const TensorView& other) const {
    return device_type_ == other.device_type_ && device_index_ == other.device_index_;
  }

  bool has_shape_of(const TensorView& other) const {
    return dim_ == other.dim_ && std::equal(sizes_, sizes_ + dim_, other.sizes_);
  }

  void* mutable_data_ptr() const {
    void* data;
    TORCH_ERROR_CODE_CHECK(torch_get_mutable_data_ptr(handle_, &data));
    return data;
  }

  template <class T>
  T* mutable_data_ptr() const {
    return static_cast<T*>(mutable_data_ptr());
  }

  const void* const_data_ptr() const {
    const void* data;
    TORCH_ERROR_CODE_CHECK(torch_get_const_data_ptr(handle_, &data));
    return data;
  }

 private:
  AtenTensorHandle handle_;
  const int64_t* sizes_;
  int64_t dim_;
  int32_t dtype_, device_type_, device_index_;
  ScalarType type_;
  bool contiguous_;
};

// A Tensor[] argument of an op. Copies are of the same tensors.
class Tensors {
 public:
  explicit Tensors(StableListHandle list) : Tensors(own(list)) {}

  // The same tensors, as they are now.
  Tensors again() const { return Tensors(owned_); }

  size_t size() const { return views_.size(); }
  bool empty() const { return views_.empty(); }
  const TensorView& front() const { return views_.front(); }
  const TensorView& operator[](size_t i) const { return views_[i]; }
  auto begin() const { return views_.begin(); }
  auto end() const { return views_.end(); }

 private:
  struct DeleteList {
    void operator()(StableListHandle list) const { torch_delete_list(list); }
  };
  struct DeleteTensor {
    void operator()(AtenTensorHandle tensor) const { aoti_torch_delete_tensor_object(tensor); }
  };

  using Owned = std::vector<std::unique_ptr<AtenTensorOpaque, DeleteTensor>>;

  explicit Tensors(std::shared_ptr<const Owned> owned) : owned_(std::move(owned)) {
    views_.reserve(owned_->size());
    for (const auto& tensor : *owned_) views_.emplace_back(tensor.get(), views_.empty() ? nullptr : &views_.back());
  }

  static std::shared_ptr<const Owned> own(StableListHandle list) {
    const std::unique_ptr<StableListOpaque, DeleteList> owned_list(list);
    size_t size;
    TORCH_ERROR_CODE_CHECK(torch_list_size(list, &size));
    auto owned = std::make_shared<Owned>();
    owned->reserve(size);
    for (size_t i = 0; i < size; ++i) {
      StableIValue item;
      TORCH_ERROR_CODE_CHECK(torch_list_get_item(list, i, &item));
      owned->emplace_back(torch::stable::detail::to<AtenTensorHandle>(item));
    }
    return owned;
  }

  std::shared_ptr<const Owned> owned_;
  std::vector<TensorView> views_;
};

}  // namespace burnish

HIDDEN_NAMESPACE_BEGIN(torch, stable, detail)

template <>
struct ToImpl<burnish::Tensors> {
  static burnish::Tensors call(StableIValue value, uint64_t, bool) {
    return burnish::Tensors(to<StableListHandle>(value));
  }
};

HIDDEN_NAMESPACE_END(torch, stable, detail)

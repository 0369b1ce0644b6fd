// A stand-in for an Ascend chip: a private-use device, to be renamed `npu`, whose memory is host memory and whose kernels are the CPU's.
//
// Every operator has the same boxed kernel: npu tensors become CPU tensors that alias the same memory, the CPU kernel runs, and
// its results are labelled npu again (views are recognised by their storage). By hand stand only what that cannot do: empty tensors,
// copies between devices, set_, the choice of an attention kernel, the device guard, the hooks, and an allocator that counts bytes
// and refuses above a limit. Device strings, device threads of autograd, allocator figures and out-of-memory errors are therefore those
// of a foreign device; numbers are the CPU's, bit for bit, and speed means nothing.

#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/DispatchStub.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/native/transformers/sdp_utils_cpp.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/extension.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <string>
#include <unordered_map>

namespace {

constexpr auto kNpu = c10::DeviceType::PrivateUse1;
constexpr int kDevices = 2;
thread_local c10::DeviceIndex current = 0;

struct Meter {
  std::atomic<int64_t> used{0}, peak{0}, limit{int64_t(1) << 34};
};
std::array<Meter, kDevices> meters;

// What a piece of npu memory hangs on: the host memory, and the meter to be credited when it goes.
struct Block {
  c10::DataPtr host;
  c10::DeviceIndex device;
  int64_t bytes;
  ~Block() { meters[device].used -= bytes; }
};

c10::DataPtr labelled(c10::DataPtr host, int64_t bytes, c10::DeviceIndex device) {
  Meter& meter = meters[device];
  TORCH_CHECK_WITH(OutOfMemoryError, meter.used + bytes <= meter.limit, "NPU out of memory. Tried to allocate ", bytes, " bytes; ",
                   meter.used.load(), " of ", meter.limit.load(), " in use (stand-in device ", int(device), ")");
  meter.used += bytes;
  int64_t now = meter.used, peak = meter.peak;
  while (now > peak && !meter.peak.compare_exchange_weak(peak, now)) {}
  void* data = host.get();
  auto* block = new Block{std::move(host), device, bytes};
  return {data, block, [](void* held) { delete static_cast<Block*>(held); }, c10::Device(kNpu, device)};
}

struct Allocator final : c10::DeviceAllocator {
  c10::DataPtr allocate(size_t bytes) override { return labelled(c10::GetCPUAllocator()->allocate(bytes), bytes, current); }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t) override {}
  void recordStream(const c10::DataPtr&, c10::Stream) override {}
  void resetAccumulatedStats(c10::DeviceIndex) override {}
  void resetPeakStats(c10::DeviceIndex device) override { meters[device].peak = meters[device].used.load(); }
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex device) override {
    c10::CachingDeviceAllocator::DeviceStats stats;
    auto& total = stats.allocated_bytes[0];
    total.current = meters[device].used;
    total.peak = meters[device].peak;
    return stats;
  }
  std::pair<size_t, size_t> getMemoryInfo(c10::DeviceIndex device) override {
    return {meters[device].limit - meters[device].used, meters[device].limit};
  }
};
Allocator allocator;
REGISTER_ALLOCATOR(kNpu, &allocator);

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kNpu; }
  c10::Device exchangeDevice(c10::Device device) const override {
    auto before = getDevice();
    setDevice(device);
    return before;
  }
  c10::Device getDevice() const override { return {kNpu, current}; }
  void setDevice(c10::Device device) const override { current = device.has_index() ? device.index() : current; }
  void uncheckedSetDevice(c10::Device device) const noexcept override { current = device.has_index() ? device.index() : current; }
  c10::Stream getStream(c10::Device device) const override { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream getDefaultStream(c10::Device device) const override { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream getNewStream(c10::Device device, int) const override { return getStream(device); }  // all work is done when a call returns
  c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return kDevices; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeDevice(c10::DeviceIndex) const override {}
  void record(void**, const c10::Stream&, c10::DeviceIndex, c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, c10::DeviceIndex) const noexcept override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return kDevices; }
  void setCurrentDevice(c10::DeviceIndex device) const override { current = device; }
  c10::DeviceIndex getCurrentDevice() const override { return current; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex device) const override { return std::exchange(current, device); }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex device) const override { return exchangeDevice(device); }
  at::Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }  // all host memory is as good as pinned
  bool isPinnedPtr(const void*) const override { return false; }
  // FSDP2 frees gathered weights by making their storage empty.
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    c10::StorageImpl* held = storage.unsafeGetStorageImpl();
    c10::DeviceGuard guard(storage.device());
    at::DataPtr fresh = held->allocator()->allocate(bytes);
    if (const size_t kept = std::min(bytes, held->nbytes())) std::memcpy(fresh.get(), held->data(), kept);
    held->set_data_ptr_noswap(std::move(fresh));
    held->set_nbytes(bytes);
  }
};

bool is_npu(const at::Tensor& tensor) { return tensor.defined() && tensor.device().type() == kNpu; }

// ---- the aliasing fallback

struct Crossing {
  std::unordered_map<c10::StorageImpl*, c10::Storage> npu_of, cpu_of;           // storages, by the other side's
  struct Pair { at::Tensor alias, npu; };                                       // the alias is kept: the kernel may drop its arguments
  std::unordered_map<c10::TensorImpl*, Pair> original;                          // by the alias
  c10::DeviceIndex device = current;
  bool touched = false;

  at::Tensor to_cpu(const at::Tensor& tensor) {
    if (!is_npu(tensor)) return tensor;
    touched = true;
    device = tensor.device().index();
    const c10::Storage& storage = tensor.storage();
    auto found = cpu_of.find(storage.unsafeGetStorageImpl());
    if (found == cpu_of.end()) {
      auto* keeper = new c10::Storage(storage);
      c10::DataPtr data(storage.mutable_data(), keeper, [](void* held) { delete static_cast<c10::Storage*>(held); }, at::kCPU);
      c10::Storage alias(c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(data), c10::GetCPUAllocator(), true);
      found = cpu_of.emplace(storage.unsafeGetStorageImpl(), alias).first;
      npu_of.emplace(alias.unsafeGetStorageImpl(), storage);
    }
    auto alias = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(found->second), c10::DispatchKeySet(c10::DispatchKey::CPU), tensor.dtype());
    alias.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
    if (tensor.unsafeGetTensorImpl()->is_wrapped_number()) alias.unsafeGetTensorImpl()->set_wrapped_number(true);
    original.emplace(alias.unsafeGetTensorImpl(), Pair{alias, tensor});
    return alias;
  }

  at::Tensor to_npu(const at::Tensor& tensor) {
    if (!tensor.defined() || tensor.device().type() != at::kCPU) return tensor;
    if (auto found = original.find(tensor.unsafeGetTensorImpl()); found != original.end()) return found->second.npu;
    auto found = npu_of.find(tensor.storage().unsafeGetStorageImpl());
    if (found == npu_of.end()) {  // fresh memory: take it over, label and count it
      auto* impl = tensor.storage().unsafeGetStorageImpl();
      int64_t bytes = impl->nbytes();
      auto data = labelled(impl->set_data_ptr(c10::DataPtr(nullptr, at::kCPU)), bytes, device);
      c10::Storage fresh(c10::Storage::use_byte_size_t(), bytes, std::move(data), &allocator, true);
      found = npu_of.emplace(impl, fresh).first;
    }
    c10::InferenceMode normal(false);  // a view of a parameter, which is no inference tensor, may be none either
    auto result = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(found->second), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), tensor.dtype());
    result.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
    return result;
  }

  // resize_ and out= may have given an alias new memory and a new shape: carry both over.
  void write_back() {
    for (auto& [impl, pair] : original) {
      at::Tensor& tensor = pair.npu;
      auto* alias_storage = impl->storage().unsafeGetStorageImpl();
      auto* storage = tensor.storage().unsafeGetStorageImpl();
      if (alias_storage->data() != storage->data()) {
        int64_t bytes = alias_storage->nbytes();
        storage->set_data_ptr_noswap(labelled(alias_storage->set_data_ptr(c10::DataPtr(nullptr, at::kCPU)), bytes, device));
        storage->set_nbytes(bytes);
      }
      if (impl->sizes() != tensor.sizes() || impl->strides() != tensor.strides())
        tensor.unsafeGetTensorImpl()->set_sizes_and_strides(impl->sizes(), impl->strides(), impl->storage_offset());
    }
  }

  c10::IValue cross(const c10::IValue& value, bool home) {
    auto one = [&](const at::Tensor& tensor) { return home ? to_npu(tensor) : to_cpu(tensor); };
    if (value.isTensor()) return one(value.toTensor());
    if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& tensor : value.toTensorVector()) list.push_back(one(tensor));
      return list;
    }
    if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> list;
      for (const std::optional<at::Tensor>& tensor : value.toOptionalTensorList())
        list.push_back(tensor.has_value() ? std::optional<at::Tensor>(one(*tensor)) : std::nullopt);
      return list;
    }
    if (!home && value.isDevice() && value.toDevice().type() == kNpu) {
      touched = true;
      if (value.toDevice().has_index()) device = value.toDevice().index();
      return c10::Device(at::kCPU);
    }
    return value;
  }
};

void kernel(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  Crossing crossing;
  auto arguments = torch::jit::last(*stack, op.schema().arguments().size());
  std::vector<c10::IValue> crossed;
  for (const auto& argument : arguments) crossed.push_back(crossing.cross(argument, false));
  torch::jit::drop(*stack, arguments.size());
  for (auto& argument : crossed) stack->push_back(std::move(argument));
  op.callBoxed(stack);
  crossing.write_back();
  auto results = torch::jit::last(*stack, op.schema().returns().size());
  std::vector<c10::IValue> home;
  for (const auto& result : results) home.push_back(crossing.cross(result, true));
  torch::jit::drop(*stack, results.size());
  for (auto& result : home) stack->push_back(std::move(result));
}

// ---- what a chip of this kind may do wrong, by operator; planted before its kernels are registered

std::unordered_map<std::string, std::string> planted;  // "aten::mm" or "aten::add.Tensor" -> the kind

std::string fault_of(const c10::OperatorHandle& op) {
  for (const std::string& name : {toString(op.operator_name()), op.operator_name().name})
    if (auto found = planted.find(name); found != planted.end()) return found->second;
  return "";
}

// Where the operators without a kernel go, as torch_npu's own fallback does: to the host, with its words or (kind "quiet") without.
void host(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  if (fault_of(op) == "host")
    TORCH_WARN("CAUTION: The operator '", toString(op.operator_name()), "' is not currently supported on the NPU backend and will fall back to run on the CPU. This may have performance implications.");
  kernel(op, stack);
}

void faulty(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const std::string kind = fault_of(op);
  TORCH_CHECK_NOT_IMPLEMENTED(kind != "missing", "Could not run '", toString(op.operator_name()), "' with arguments from the 'npu' backend.");
  if (kind == "dead") throw c10::AcceleratorError({__func__, __FILE__, uint32_t(__LINE__)}, 507015, "NPU function error: aicore exception, error code is 507015");
  kernel(op, stack);
  const c10::IValue& first = stack->at(stack->size() - op.schema().returns().size());
  if (!first.isTensor() || !first.toTensor().is_floating_point() || !first.toTensor().numel()) return;
  at::NoGradGuard no_grad;
  at::Tensor middle = first.toTensor().reshape(-1).slice(0, first.toTensor().numel() / 2, first.toTensor().numel() / 2 + 1);
  middle.fill_(kind == "nan" ? at::Scalar(NAN) : at::Scalar(0.0));
}

// A kernel for every operator that the CPU has and nobody else answers for, so that "has a kernel of its own" means on the stand-in what it means on a chip.
void register_kernels() {
  static torch::Library library(torch::Library::IMPL, "aten", c10::DispatchKey::PrivateUse1, __FILE__, __LINE__);
  auto& dispatcher = c10::Dispatcher::singleton();
  for (const c10::OperatorName& name : dispatcher.getAllOpNames()) {
    auto op = dispatcher.findOp(name);
    if (name.name.rfind("aten::", 0) != 0 || !op || !op->hasKernelForDispatchKey(c10::DispatchKey::CPU) || op->hasKernelForDispatchKey(c10::DispatchKey::PrivateUse1)) continue;
    const std::string kind = fault_of(*op);
    if (kind == "host" || kind == "quiet") continue;
    library.impl(toString(name).c_str(), kind.empty() ? torch::CppFunction::makeFromBoxedFunction<&kernel>() : torch::CppFunction::makeFromBoxedFunction<&faulty>());
  }
}

// ---- by hand

at::Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<at::Device> device,
                 std::optional<bool>, std::optional<at::MemoryFormat> format) {
  c10::OptionalDeviceGuard guard(device);
  return at::detail::empty_generic(size, &allocator, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), at::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                         std::optional<at::Device> device, std::optional<bool>) {
  c10::OptionalDeviceGuard guard(device);
  return at::detail::empty_strided_generic(size, stride, &allocator, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), at::dtype_or_default(dtype));
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool) {
  Crossing crossing;
  crossing.to_cpu(to).copy_(crossing.to_cpu(from));
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  to.resize_(from.sizes());
  return copy_from(from, to, false);
}

at::Tensor& set_storage(at::Tensor& self, at::Storage source, int64_t offset, at::IntArrayRef size, at::IntArrayRef stride) {
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(source));
  std::vector<int64_t> strides = stride.vec();
  if (strides.empty()) {
    strides.resize(size.size());
    int64_t step = 1;
    for (int64_t i = int64_t(size.size()) - 1; i >= 0; step *= size[i--]) strides[i] = step;
  }
  self.unsafeGetTensorImpl()->set_sizes_and_strides(size, strides, offset);
  return self;
}

at::Tensor& set_whole_storage(at::Tensor& self, at::Storage source) {
  int64_t count = source.nbytes() / self.element_size();
  return set_storage(self, std::move(source), 0, {count}, {});
}

at::Tensor& set_tensor(at::Tensor& self, const at::Tensor& source) {
  return set_storage(self, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

int64_t attention_kernel(const at::Tensor&, const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, double, bool, std::optional<double>, bool) {
  return static_cast<int64_t>(sdp::SDPBackend::math);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&host>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", &empty);
  library.impl("empty_strided", &empty_strided);
  library.impl("_copy_from", &copy_from);
  library.impl("_copy_from_and_resize", &copy_from_and_resize);
  library.impl("set_.source_Storage", &set_whole_storage);
  library.impl("set_.source_Storage_storage_offset", &set_storage);
  library.impl("set_.source_Tensor", &set_tensor);
}

// Autocast: PyTorch's own lists, as its CUDA back end has them.
TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, library) { library.fallback(torch::CppFunction::makeFallthrough()); }

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
#define LOWER(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, lower_precision_fp)
  AT_FORALL_LOWER_PRECISION_FP(LOWER)
#define FP32(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32)
  AT_FORALL_FP32(FP32)
#define FP32_OPT(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32_set_opt_dtype)
  AT_FORALL_FP32_SET_OPT_DTYPE(FP32_OPT)
#define PROMOTE(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, promote)
  AT_FORALL_PROMOTE(PROMOTE)
}

}  // namespace

namespace at::native {
REGISTER_PRIVATEUSE1_DISPATCH(_fused_sdp_choice_stub, &attention_kernel);
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.def("install_hooks", [] {
    static Hooks hooks;
    at::RegisterPrivateUse1HooksInterface(&hooks);
  });
  module.def("plant", [](const std::string& kind, const std::string& op) { planted[op] = kind; });
  module.def("register_kernels", &register_kernels);
  module.def("set_limit", [](int device, int64_t bytes) { meters[device].limit = bytes; });
  module.def("used", [](int device) { return meters[device].used.load(); });
  module.def("total", [](int device) { return meters[device].limit.load(); });
  module.def("device_count", [] { return kDevices; });
  module.def("current_device", [] { return int(current); });
  module.def("set_device", [](int device) { current = c10::DeviceIndex(device); });
}

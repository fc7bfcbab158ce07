// A device for machines without one: its memory is the host's, but torch takes it for an accelerator's.
//
// Tensors of the host and of the device can't meet in an operation. Copies that don't block are done as late as a real device may
// do them: what goes to the device is read at the next operation on the same stream, and what comes from it is there when the host
// has waited for that stream. Streams wait for one another only by events.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/native/TensorFactories.h>
#include <ATen/ops/view_as_complex_native.h>
#include <ATen/ops/view_as_real_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/extension.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <functional>
#include <limits>
#include <mutex>
#include <unordered_map>
#include <vector>

namespace {

using at::Tensor;
using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;

constexpr auto DEVICE = DeviceType::PrivateUse1;
constexpr DeviceIndex COUNT = 8;

thread_local DeviceIndex current = 0;

// ---------------------------------------------------------------- memory

struct Counts {
  int64_t synchronizations = 0;
  int64_t device_bytes = 0;
  int64_t pinned_bytes = 0;
  int64_t pinned_budget = -1;
  int64_t device_budget = -1;
} counts;

std::recursive_mutex lock;
std::unordered_map<void*, std::pair<size_t, size_t>> pinned; // address -> size, charged
std::unordered_map<void*, size_t> on_device;

void release_device(void* address) {
  std::lock_guard<std::recursive_mutex> guard(lock);
  auto found = on_device.find(address);
  if (found != on_device.end()) {
    counts.device_bytes -= found->second;
    on_device.erase(found);
  }
  std::free(address);
}

struct DeviceAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    Device device(DEVICE, current);
    if (size == 0) return {nullptr, nullptr, &release_device, device};
    std::lock_guard<std::recursive_mutex> guard(lock);
    TORCH_CHECK_WITH(OutOfMemoryError, counts.device_budget < 0 || counts.device_bytes + int64_t(size) <= counts.device_budget,
        "the device has no room for ", size, " bytes");
    void* address = nullptr;
    TORCH_CHECK(posix_memalign(&address, 64, size) == 0, "no memory");
    counts.device_bytes += size;
    on_device[address] = size;
    return {address, address, &release_device, device};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release_device; }
  void copy_data(void* to, const void* from, std::size_t size) const override { std::memcpy(to, from, size); }
} device_allocator;

size_t charged(size_t size) {
  size_t block = 1;
  while (block < size) block *= 2;
  return block;
}

void release_pinned(void* address) {
  std::lock_guard<std::recursive_mutex> guard(lock);
  auto found = pinned.find(address);
  if (found != pinned.end()) {
    counts.pinned_bytes -= found->second.second;
    pinned.erase(found);
  }
  std::free(address);
}

struct PinnedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    if (size == 0) return {nullptr, nullptr, &release_pinned, Device(DeviceType::CPU)};
    std::lock_guard<std::recursive_mutex> guard(lock);
    const auto block = charged(size);
    TORCH_CHECK(counts.pinned_budget < 0 || counts.pinned_bytes + int64_t(block) <= counts.pinned_budget,
        "no pinned memory left for ", block, " bytes");
    void* address = nullptr;
    TORCH_CHECK(posix_memalign(&address, 64, size) == 0, "no memory");
    counts.pinned_bytes += block;
    pinned[address] = {size, block};
    return {address, address, &release_pinned, Device(DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release_pinned; }
  void copy_data(void* to, const void* from, std::size_t size) const override { std::memcpy(to, from, size); }
} pinned_allocator;

// As CUDA's: memory that was allocated elsewhere is pinned, just as large as it is. Returns CUDA's numbers of errors.
int register_host(uintptr_t address, int64_t size, unsigned int) {
  std::lock_guard<std::recursive_mutex> guard(lock);
  if (counts.pinned_budget >= 0 && counts.pinned_bytes + size > counts.pinned_budget) return 2;
  if (!pinned.emplace(reinterpret_cast<void*>(address), std::make_pair(size_t(size), size_t(size))).second) return 712;
  counts.pinned_bytes += size;
  return 0;
}

int unregister_host(uintptr_t address) {
  std::lock_guard<std::recursive_mutex> guard(lock);
  auto found = pinned.find(reinterpret_cast<void*>(address));
  if (found == pinned.end()) return 713;
  counts.pinned_bytes -= found->second.second;
  pinned.erase(found);
  return 0;
}

bool is_pinned_address(const void* data) {
  std::lock_guard<std::recursive_mutex> guard(lock);
  for (const auto& [address, sizes] : pinned) {
    if (data >= address && data < static_cast<const char*>(address) + sizes.first) return true;
  }
  return false;
}

// ---------------------------------------------------------------- copies, some of them late

struct Late {
  std::function<void()> act;
  bool to_host;
  c10::StreamId stream;
  int64_t number;
};

struct Event {
  c10::StreamId stream;
  int64_t number;
};

constexpr c10::StreamId ALL = -1;
constexpr int64_t LAST = std::numeric_limits<int64_t>::max();
thread_local c10::StreamId stream_here = 0;
std::atomic<c10::StreamId> streams{0};
std::vector<Late> late;
int64_t queued = 0;

bool concerns(const Late& each, c10::StreamId stream, bool with_host, int64_t last) {
  return (stream == ALL || each.stream == stream) && (with_host || !each.to_host) && each.number <= last;
}

// Do what was queued on a stream; what goes to the host only if the host waits.
void catch_up(c10::StreamId stream, bool with_host, int64_t last = LAST) {
  std::vector<Late> left, now; // gone when the lock is free: a tensor that goes may wait for the interpreter's
  std::lock_guard<std::recursive_mutex> guard(lock);
  for (auto& each : late) (concerns(each, stream, with_host, last) ? now : left).push_back(std::move(each));
  late = std::move(left);
  for (auto& each : now) each.act();
}

bool is_done(c10::StreamId stream, int64_t last = LAST) {
  std::lock_guard<std::recursive_mutex> guard(lock);
  return std::none_of(late.begin(), late.end(), [&](const Late& each) { return concerns(each, stream, true, last); });
}

void queue(std::function<void()> act, bool to_host) {
  std::lock_guard<std::recursive_mutex> guard(lock);
  late.push_back({std::move(act), to_host, stream_here, ++queued});
}

void synchronize(c10::StreamId stream, int64_t last = LAST) {
  {
    std::lock_guard<std::recursive_mutex> guard(lock);
    counts.synchronizations += 1;
  }
  catch_up(stream, true, last);
}

// The same bytes as a tensor of the host.
Tensor on_host(const Tensor& tensor) {
  if (tensor.device().is_cpu()) return tensor;
  auto options = tensor.options().device(DeviceType::CPU).requires_grad(false);
  if (tensor.numel() == 0) return at::empty(tensor.sizes(), options);
  auto found = at::from_blob(const_cast<void*>(tensor.const_data_ptr()), tensor.sizes(), tensor.strides(), options);
  if (tensor.is_conj()) found = found.conj();
  if (tensor.is_neg()) found = found._neg_view();
  return found;
}

Tensor copy_from(const Tensor& from, const Tensor& to, bool non_blocking) {
  at::NoGradGuard no_grad;
  const bool from_host = from.device().is_cpu(), to_host = to.device().is_cpu();
  if (non_blocking && from_host && is_pinned_address(from.const_data_ptr())) {
    queue([from, to] { on_host(to).copy_(from); }, false);
  } else if (non_blocking && to_host && is_pinned_address(to.const_data_ptr())) {
    catch_up(stream_here, false);
    auto taken = on_host(from).to(to.scalar_type(), false, true);
    queue([taken, to] { to.copy_(taken); }, true);
  } else {
    catch_up(stream_here, to_host);
    on_host(to).copy_(on_host(from));
  }
  return to;
}

Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  if (to.sizes() != from.sizes()) at::native::resize_(to, from.sizes(), std::nullopt);
  return copy_from(from, to, false);
}

// ---------------------------------------------------------------- operations

c10::DispatchKeySet keys() { return c10::DispatchKeySet(c10::DispatchKey::PrivateUse1); }

struct On {
  explicit On(std::optional<Device> device) : before(current) {
    if (device && device->has_index()) current = device->index();
  }
  ~On() { current = before; }
  DeviceIndex before;
};

Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<Device> device,
    std::optional<bool>, std::optional<at::MemoryFormat> format) {
  On on(device);
  return at::detail::empty_generic(size, &device_allocator, keys(), c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<Device> device, std::optional<bool>) {
  On on(device);
  return at::detail::empty_strided_generic(size, stride, &device_allocator, keys(), c10::dtype_or_default(dtype));
}

Tensor as_strided(const Tensor& self, at::IntArrayRef size, at::IntArrayRef stride, std::optional<int64_t> offset) {
  return at::native::as_strided_tensorimpl(self, size, stride, offset);
}

const Tensor& resize_(const Tensor& self, c10::SymIntArrayRef size, std::optional<at::MemoryFormat> format) {
  return at::native::resize_(self, C10_AS_INTARRAYREF_SLOW(size), format);
}

Tensor reshape_alias(const Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  return at::native::_reshape_alias(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

Tensor view(const Tensor& self, c10::SymIntArrayRef size) { return at::native::view(self, C10_AS_INTARRAYREF_SLOW(size)); }

Tensor& set_storage(Tensor& self, at::Storage source, c10::SymInt offset, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  return at::native::set_storage_cpu_(self, source, offset.expect_int(), C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

Tensor& set_whole(Tensor& self, at::Storage source) { return at::native::set_(self, source); }
Tensor& set_tensor(Tensor& self, const Tensor& source) { return at::native::set_tensor_(self, source); }

at::Scalar local_scalar_dense(const Tensor& self) {
  synchronize(stream_here);
  return on_host(self).item();
}

void record_stream(Tensor&, c10::Stream) {}

// As CUDA's: counts whole numbers too, which the host's doesn't.
Tensor histc(const Tensor& self, int64_t bins, const at::Scalar& low, const at::Scalar& high) {
  catch_up(stream_here, false);
  return at::histc(on_host(self).to(at::kDouble), bins, low, high).to(self.scalar_type()).to(self.device());
}

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  catch_up(stream_here, false);
  bool device = false;
  std::vector<Tensor> host;
  auto look = [&](const Tensor& tensor) {
    if (!tensor.defined()) return;
    if (tensor.device().type() == DEVICE) device = true;
    else if (tensor.dim() > 0 && tensor.device().is_cpu()) host.push_back(tensor);
  };
  const auto count = op.schema().arguments().size();
  for (size_t place = stack->size() - count; place < stack->size(); ++place) {
    const auto& value = (*stack)[place];
    if (value.isTensor()) look(value.toTensor());
    else if (value.isTensorList()) for (const Tensor& each : value.toTensorVector()) look(each);
  }
  TORCH_CHECK(!device || host.empty(), "Expected all tensors to be on the same device: ", op.schema().name(),
      " has a tensor on the host, of shape ", host.empty() ? at::IntArrayRef() : host[0].sizes());
  at::native::cpu_fallback(op, stack);
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", TORCH_FN(empty));
  m.impl("empty_strided", TORCH_FN(empty_strided));
  m.impl("as_strided", TORCH_FN(as_strided));
  m.impl("resize_", TORCH_FN(resize_));
  m.impl("_reshape_alias", TORCH_FN(reshape_alias));
  m.impl("view", TORCH_FN(view));
  m.impl("view_as_real", TORCH_FN(at::native::view_as_real));
  m.impl("view_as_complex", TORCH_FN(at::native::view_as_complex));
  m.impl("set_.source_Storage_storage_offset", TORCH_FN(set_storage));
  m.impl("set_.source_Storage", TORCH_FN(set_whole));
  m.impl("set_.source_Tensor", TORCH_FN(set_tensor));
  m.impl("_local_scalar_dense", TORCH_FN(local_scalar_dense));
  m.impl("_copy_from", TORCH_FN(copy_from));
  m.impl("_copy_from_and_resize", TORCH_FN(copy_from_and_resize));
  m.impl("record_stream", TORCH_FN(record_stream));
  m.impl("histc", TORCH_FN(histc));
}

// Otherwise torch makes a plain copy first, by the same operation, without end.
TORCH_LIBRARY_IMPL(aten, Conjugate, m) { m.impl("_copy_from", torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(aten, Negative, m) { m.impl("_copy_from", torch::CppFunction::makeFallthrough()); }

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

// ---------------------------------------------------------------- guard and hooks

struct Guard final : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return DEVICE; }
  Device exchangeDevice(Device device) const override {
    Device before(DEVICE, current);
    if (device.has_index()) current = device.index();
    return before;
  }
  Device getDevice() const override { return Device(DEVICE, current); }
  void setDevice(Device device) const override { if (device.has_index()) current = device.index(); }
  void uncheckedSetDevice(Device device) const noexcept override { if (device.has_index()) current = device.index(); }
  static c10::Stream numbered(Device device, c10::StreamId number) { return c10::Stream(c10::Stream::UNSAFE, device, number); }
  c10::Stream getStream(Device device) const override { return numbered(device, stream_here); }
  c10::Stream getDefaultStream(Device device) const override { return numbered(device, 0); }
  c10::Stream getNewStream(Device device, int) const override { return numbered(device, ++streams); }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    return numbered(stream.device(), std::exchange(stream_here, stream.id()));
  }
  DeviceIndex deviceCount() const noexcept override { return COUNT; }
  static Event& of(void* event) { return *static_cast<Event*>(event); }
  void record(void** event, const c10::Stream& stream, DeviceIndex, c10::EventFlag) const override {
    if (*event == nullptr) *event = new Event;
    std::lock_guard<std::recursive_mutex> guard(lock);
    of(*event) = {stream.id(), queued};
  }
  void block(void* event, const c10::Stream&) const override { catch_up(of(event).stream, false, of(event).number); }
  bool queryEvent(void* event) const override { return is_done(of(event).stream, of(event).number); }
  void destroyEvent(void* event, DeviceIndex) const noexcept override { delete static_cast<Event*>(event); }
  bool queryStream(const c10::Stream& stream) const override { return is_done(stream.id()); }
  void synchronizeStream(const c10::Stream& stream) const override { synchronize(stream.id()); }
  void synchronizeEvent(void* event) const override { synchronize(of(event).stream, of(event).number); }
  void synchronizeDevice(const DeviceIndex) const override { synchronize(ALL); }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return COUNT; }
  void setCurrentDevice(DeviceIndex device) const override { current = device; }
  DeviceIndex getCurrentDevice() const override { return current; }
  DeviceIndex exchangeDevice(DeviceIndex device) const override { return std::exchange(current, device); }
  DeviceIndex maybeExchangeDevice(DeviceIndex device) const override { return std::exchange(current, device); }
  const at::Generator& getDefaultGenerator(DeviceIndex) const override { return at::detail::getDefaultCPUGenerator(); }
  at::Generator getNewGenerator(DeviceIndex) const override { return at::make_generator<at::CPUGeneratorImpl>(); }
  Device getDeviceFromPtr(void*) const override { return Device(DEVICE, current); }
  bool isPinnedPtr(const void* data) const override { return is_pinned_address(data); }
  at::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t size) const override {
    auto fresh = device_allocator.allocate(size);
    if (storage.nbytes() && size) std::memcpy(fresh.get(), storage.data(), std::min(storage.nbytes(), size));
    storage.unsafeGetStorageImpl()->set_data_ptr(std::move(fresh));
    storage.unsafeGetStorageImpl()->set_nbytes(size);
  }
} hooks;

} // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  c10::SetAllocator(DEVICE, &device_allocator);
  at::RegisterPrivateUse1HooksInterface(&hooks);
  m.def("synchronize", [] { py::gil_scoped_release release; synchronize(ALL); });
  // Gives a parameter the memory of another tensor, as `.data =` does where torch knows both devices.
  m.def("set_data", [](const Tensor& param, const Tensor& data) {
    param.unsafeGetTensorImpl()->shallow_copy_from(data.getIntrusivePtr());
  });
  m.def("cudaHostRegister", &register_host);
  m.def("cudaHostUnregister", &unregister_host);
  m.def("current_device", [] { return int(current); });
  m.def("set_device", [](int device) { current = DeviceIndex(device); });
  m.def("device_count", [] { return int(COUNT); });
  m.def("synchronizations", [] { return counts.synchronizations; });
  m.def("pinned_bytes", [] { return counts.pinned_bytes; });
  m.def("device_bytes", [] { return counts.device_bytes; });
  m.def("set_pinned_budget", [](int64_t bytes) { counts.pinned_budget = bytes; });
  m.def("set_device_budget", [](int64_t bytes) { counts.device_budget = bytes; });
}

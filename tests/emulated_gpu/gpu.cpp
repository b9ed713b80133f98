// A CUDA device whose memory is that of the host and whose kernels are those of the CPU.
//
// Tensors say `cuda`, hold real memory, and go through torch's own dispatch, autograd and autocast.
// What a GPU would refuse is refused (tensors of two devices, a CPU generator, a wait while a graph
// is recorded), what makes the host wait is counted, and a copy to the host that does not wait
// arrives only when something waits for it.

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/NativeFunctions.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <set>

using namespace at;

static int number(const char* name, int otherwise) {
  const char* text = getenv(name);
  return text ? atoi(text) : otherwise;
}
// one device a process, as torchrun numbers them
static Device own_device() { return Device(DeviceType::CUDA, number("LOCAL_RANK", 0)); }
static int device_count() { return std::max(number("LOCAL_WORLD_SIZE", 1), own_device().index() + 1); }

// ---- what Python is told ---------------------------------------------------------------------

enum Kind { WAIT, PAGEABLE, RACE };
typedef void (*Listener)(int kind, const char* what);
static Listener listener = nullptr;
static bool quiet = false;   // the emulation itself copies
static bool strict = false;  // torch.cuda.set_sync_debug_mode("error")
static void tell(Kind kind, const std::string& what) {
  if (listener && !quiet) listener(kind, what.c_str());
}

struct Launch {
  c10::OperatorHandle op;
  std::vector<c10::IValue> in, out;
};
static thread_local std::vector<Launch>* recording = nullptr;

static void host_waits(const std::string& what) {
  if (quiet) return;
  TORCH_CHECK(!strict, "called a synchronizing CUDA operation: ", what);
  TORCH_CHECK(!recording, "operation not permitted when stream is capturing: ", what);
  tell(WAIT, what);
}

// ---- memory ------------------------------------------------------------------------------------

static std::recursive_mutex lock;
static std::map<char*, size_t> pinned;  // begin, size

static void* reserve(size_t n) {
  size_t whole = (n + 127) / 64 * 64;
  void* memory = aligned_alloc(64, whole);
  memset(memory, 0x7f, whole);  // what was never written is not zero by luck
  return memory;
}

struct HostMemory : Allocator {
  DataPtr allocate(size_t n) override {
    void* memory = n ? reserve(n) : nullptr;
    return {memory, memory, &free, own_device()};
  }
  DeleterFnPtr raw_deleter() const override { return &free; }
  void copy_data(void* to, const void* from, size_t n) const override { memcpy(to, from, n); }
};
static HostMemory device_allocator;

// pinned memory that the device still reads, and copies to it that are still to come
struct Upload {
  const char* begin;
  std::string sent;
};
static std::vector<Upload> uploads;
struct Download {
  Tensor to, from;
};
static std::vector<Download> downloads;

static void check(const Upload& upload) {
  if (memcmp(upload.begin, upload.sent.data(), upload.sent.size()))
    tell(RACE, "pinned memory changed before the device had read it");
}

static void free_pinned(void* memory) {
  std::lock_guard<std::recursive_mutex> guard(lock);
  char* begin = (char*)memory;
  std::vector<Upload> others;
  for (auto& upload : uploads)
    if (upload.begin < begin || upload.begin >= begin + pinned[begin]) others.push_back(upload);
    else check(upload);  // torch keeps freed pinned memory until it has been read
  uploads.swap(others);
  pinned.erase(begin);
  free(memory);
}
struct PinnedAllocator : Allocator {
  DataPtr allocate(size_t n) override {
    void* memory = reserve(n);
    std::lock_guard<std::recursive_mutex> guard(lock);
    pinned[(char*)memory] = n + 1;
    return {memory, memory, &free_pinned, Device(kCPU)};
  }
  DeleterFnPtr raw_deleter() const override { return &free_pinned; }
  void copy_data(void* to, const void* from, size_t n) const override { memcpy(to, from, n); }
};
static PinnedAllocator pinned_allocator;

static bool is_pinned(const void* memory) {
  std::lock_guard<std::recursive_mutex> guard(lock);
  auto next = pinned.upper_bound((char*)memory);
  if (next == pinned.begin()) return false;
  --next;
  return (char*)memory < next->first + next->second;
}

// the device catches up with the host
static void settle() {
  std::lock_guard<std::recursive_mutex> guard(lock);
  for (auto& upload : uploads) check(upload);
  uploads.clear();
  auto coming = std::move(downloads);
  downloads.clear();
  c10::impl::ExcludeDispatchKeyGuard below(c10::autograd_dispatch_keyset);
  for (auto& download : coming) download.to.copy_(download.from);
}

// ---- the device as torch asks for it -------------------------------------------------------------

struct OneStream final : public c10::impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  static Stream stream() { return Stream(Stream::DEFAULT, own_device()); }
  Device exchangeDevice(Device) const override { return own_device(); }
  Device getDevice() const override { return own_device(); }
  Stream getStream(Device) const noexcept override { return stream(); }
  Stream getNewStream(Device, int = 0) const override { return stream(); }
  Stream getDefaultStream(Device) const override { return stream(); }
  Stream exchangeStream(Stream) const noexcept override { return stream(); }
  DeviceIndex deviceCount() const noexcept override { return device_count(); }
  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};
namespace c10::impl {
C10_REGISTER_GUARD_IMPL(CUDA, OneStream)
}

static std::set<void*> generators;
struct CUDAHooks : public CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool hasCUDART() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex current_device() const override { return own_device().index(); }
  DeviceIndex getCurrentDevice() const override { return own_device().index(); }
  DeviceIndex deviceCount() const override { return device_count(); }
  int getNumGPUs() const override { return device_count(); }
  Device getDeviceFromPtr(void*) const override { return own_device(); }
  bool isPinnedPtr(const void* memory) const override { return is_pinned(memory); }
  Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
  Allocator* getCUDADeviceAllocator() const override { return &device_allocator; }
  Generator getNewGenerator(DeviceIndex) const override {
    Generator generator = at::detail::createCPUGenerator(0);
    generators.insert(generator.unsafeGetGeneratorImpl());
    return generator;
  }
  const Generator& getDefaultGenerator(DeviceIndex) const override {
    static Generator generator = getNewGenerator(0);
    return generator;
  }
};
namespace at {
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, CUDAHooks)
}

// ---- kernels -------------------------------------------------------------------------------------

static Storage storage_on(const Storage& storage, Device device) {
  auto* holder = new Storage(storage);
  auto release = [](void* held) { delete (Storage*)held; };
  Allocator* allocator = device.is_cuda() ? (Allocator*)&device_allocator : c10::GetCPUAllocator();
  DataPtr data(storage.mutable_data(), holder, release, device);
  return Storage(
      Storage::use_byte_size_t(), storage.nbytes(), std::move(data), allocator, true);
}

// the same memory as a tensor of the other device
static Tensor seen_on(const Tensor& tensor, Device device) {
  auto* impl = tensor.unsafeGetTensorImpl();
  DispatchKeySet keys(device.is_cuda() ? DispatchKey::CUDA : DispatchKey::CPU);
  if (tensor.is_conj()) keys = keys.add(DispatchKey::Conjugate);
  if (tensor.is_neg()) keys = keys.add(DispatchKey::Negative);
  auto storage = storage_on(impl->unsafe_storage(), device);
  Tensor out = at::detail::make_tensor<TensorImpl>(std::move(storage), keys, tensor.dtype());
  auto* made = out.unsafeGetTensorImpl();
  made->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
  if (impl->is_wrapped_number()) made->set_wrapped_number(true);
  return out;
}

using Change = std::function<Tensor(const Tensor&)>;
static c10::IValue changed(const c10::IValue& value, const Change& change) {
  if (value.isTensor()) return change(value.toTensor());
  if (value.isTensorList()) {
    c10::List<Tensor> out;
    for (const Tensor& tensor : value.toTensorVector()) out.push_back(change(tensor));
    return out;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<Tensor>> out;
    for (const auto& tensor : value.toOptionalTensorVector())
      out.push_back(tensor ? std::optional<Tensor>(change(*tensor)) : tensor);
    return out;
  }
  if (value.isList() && value.toListRef().size() && value.toListRef()[0].isTensorList()) {
    c10::impl::GenericList out(c10::ListType::ofTensors());
    for (const auto& inner : value.toListRef()) out.push_back(changed(inner, change));
    return out;
  }
  return value;
}

static const std::set<std::string> WAITING = {
    "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_dim",
    "aten::unique_consecutive", "aten::bincount", "aten::equal", "aten::_local_scalar_dense"};
static const std::set<std::string> INDEXING = {
    "aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_",
    "aten::_unsafe_index"};
// these take no number of the host beside tensors of the device
static const std::set<std::string> STRICT_ABOUT_NUMBERS = {
    "aten::embedding", "aten::index_select", "aten::gather", "aten::scatter", "aten::cat",
    "aten::index_add_", "aten::mm", "aten::bmm", "aten::addmm"};

// what a GPU would say of these arguments
static void examine(const std::string& name, const std::vector<c10::IValue>& arguments) {
  bool device = false, host = false, host_number = false;
  std::ostringstream shapes;
  auto note = [&](const Tensor& tensor) -> Tensor {
    if (!tensor.defined()) return tensor;
    shapes << tensor.device() << tensor.sizes() << " ";
    if (tensor.is_cuda()) device = true;
    else (tensor.dim() ? host : host_number) = true;
    return tensor;
  };
  for (const auto& argument : arguments) {
    if (argument.isGenerator())
      TORCH_CHECK(
          generators.count(argument.toGenerator().unsafeGetGeneratorImpl()),
          "Expected a 'cuda' device type for generator but found 'cpu': ", name);
    if (!argument.isOptionalTensorList()) {
      changed(argument, note);
      continue;
    }
    bool into_device = arguments[0].toTensor().is_cuda();  // indices
    for (const auto& index : argument.toOptionalTensorVector()) {
      if (!index || !index->defined()) continue;
      TORCH_CHECK(
          into_device || !index->is_cuda(),
          "indices should be either on cpu or on the same device as the indexed tensor (cpu)");
      if (into_device && !index->is_cuda()) {
        TORCH_CHECK(!strict, "called a synchronizing CUDA operation: indices of the host");
        tell(PAGEABLE, "indices of the host");
      }
      bool one_value = arguments.size() > 2 && arguments[2].isTensor() &&
          arguments[2].toTensor().numel() == 1;
      if (index->is_cuda() && index->scalar_type() == kBool && !one_value)
        host_waits("boolean index");
    }
  }
  if (!device) return;
  bool mixed = host || (host_number && STRICT_ABOUT_NUMBERS.count(name));
  TORCH_CHECK(
      !mixed || name.rfind("aten::_fused_adam", 0) == 0,
      "Expected all tensors to be on the same device, but found at least two devices, cuda and "
      "cpu! (", name, " ", shapes.str(), ")");
  bool size_unknown = name == "aten::repeat_interleave" && arguments.back().isNone();
  if (WAITING.count(name) || size_unknown) host_waits(name);
  if (name == "aten::_local_scalar_dense") settle();
}

// any operator: its kernel for the CPU, on the same memory
static void on_the_host(const c10::OperatorHandle& op, DispatchKeySet, torch::jit::Stack* stack) {
  const size_t takes = op.schema().arguments().size(), gives = op.schema().returns().size();
  auto last = torch::jit::last(*stack, takes);
  std::vector<c10::IValue> arguments(last.begin(), last.end());
  examine(op.schema().name(), arguments);
  std::vector<std::pair<Tensor, Tensor>> pairs;  // on the host, on the device
  Change to_host = [&](const Tensor& tensor) -> Tensor {
    if (!tensor.defined() || !tensor.is_cuda()) return tensor;
    for (auto& [host, device] : pairs)
      if (device.is_same(tensor)) return host;
    pairs.emplace_back(seen_on(tensor, kCPU), tensor);
    return pairs.back().first;
  };
  for (size_t i = 0; i < takes; i++) {
    auto& slot = (*stack)[stack->size() - takes + i];
    if (slot.isDevice() && slot.toDevice().is_cuda()) slot = Device(kCPU);
    else slot = changed(slot, to_host);
  }
  op.callBoxed(stack);
  Change to_device = [&](const Tensor& tensor) -> Tensor {
    if (!tensor.defined() || tensor.is_cuda()) return tensor;
    for (auto& [host, device] : pairs) {
      if (!host.is_same(tensor)) continue;
      auto* impl = device.unsafeGetTensorImpl();
      if (device.sizes() != tensor.sizes() || device.strides() != tensor.strides()) {
        impl->set_storage_keep_dtype(storage_on(tensor.storage(), own_device()));
        impl->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
      }
      return device;
    }
    return seen_on(tensor, own_device());
  };
  for (size_t i = 0; i < gives; i++) {
    auto& slot = (*stack)[stack->size() - gives + i];
    slot = changed(slot, to_device);
  }
  if (recording) {
    auto out = torch::jit::last(*stack, gives);
    recording->push_back({op, arguments, std::vector<c10::IValue>(out.begin(), out.end())});
  }
}

static void own_memory(std::optional<Device> device) {
  TORCH_CHECK(
      !device || !device->has_index() || *device == own_device(),
      "memory on the device of another process: ", *device);
}
static Tensor device_empty(
    IntArrayRef size, std::optional<ScalarType> dtype, std::optional<Layout>,
    std::optional<Device> device, std::optional<bool>, std::optional<MemoryFormat> format) {
  own_memory(device);
  DispatchKeySet keys(DispatchKey::CUDA);
  return at::detail::empty_generic(
      size, &device_allocator, keys, dtype_or_default(dtype), format);
}
static Tensor device_empty_strided(
    IntArrayRef size, IntArrayRef stride, std::optional<ScalarType> dtype, std::optional<Layout>,
    std::optional<Device> device, std::optional<bool>) {
  own_memory(device);
  DispatchKeySet keys(DispatchKey::CUDA);
  return at::detail::empty_strided_generic(
      size, stride, &device_allocator, keys, dtype_or_default(dtype));
}

static void resize(StorageImpl* storage, size_t n) {
  auto memory = device_allocator.allocate(n);
  if (size_t kept = std::min(n, storage->nbytes())) memcpy(memory.get(), storage->data(), kept);
  storage->set_data_ptr_noswap(std::move(memory));
  storage->set_nbytes(n);
}
static const Tensor& device_resize_(
    const Tensor& self, IntArrayRef size, std::optional<MemoryFormat>) {
  size_t needed = (c10::multiply_integers(size) + self.storage_offset()) * self.itemsize();
  if (needed > self.storage().nbytes()) resize(self.storage().unsafeGetStorageImpl(), needed);
  self.unsafeGetTensorImpl()->set_sizes_contiguous(size);
  return self;
}

static void copy_now(const Tensor& to, const Tensor& from) {
  Tensor host_to = to.is_cuda() ? seen_on(to, kCPU) : to;
  Tensor host_from = from.is_cuda() ? seen_on(from, kCPU) : from;
  c10::impl::ExcludeDispatchKeyGuard below(c10::autograd_dispatch_keyset);
  host_to.copy_(host_from);
}
static Tensor& device_copy_(Tensor& to, const Tensor& source, bool non_blocking) {
  Tensor from = source.expand(to.sizes());
  if (!to.is_cuda()) {
    bool later = non_blocking && is_pinned(to.const_data_ptr());
    if (!later) {
      host_waits("copy to the host");
      settle();
      copy_now(to, from);
      return to;
    }
    std::lock_guard<std::recursive_mutex> guard(lock);
    downloads.push_back({to, seen_on(from, kCPU).clone()});
    return to;
  }
  if (!from.is_cuda() && source.numel()) {
    const char* begin = (const char*)source.const_data_ptr();
    if (!is_pinned(begin)) {
      TORCH_CHECK(!source.dim() || !strict, "called a synchronizing CUDA operation: copy of pageable memory");
      TORCH_CHECK(!source.dim() || !recording, "copy of pageable memory when stream is capturing");
      tell(PAGEABLE, source.dim() ? "copy of pageable memory" : "copy of a number");
    } else if (non_blocking && source.is_contiguous()) {
      std::lock_guard<std::recursive_mutex> guard(lock);
      uploads.push_back({begin, std::string(begin, source.nbytes())});
    }
  }
  copy_now(to, from);
  if (recording) {
    static auto op = c10::Dispatcher::singleton().findSchemaOrThrow("aten::copy_", "");
    recording->push_back({op, {to, from, non_blocking}, {to}});
  }
  return to;
}

static Tensor& device_set_(
    Tensor& self, Storage storage, int64_t offset, IntArrayRef size, IntArrayRef stride) {
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(storage));
  self.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride, offset);
  return self;
}
static Tensor& device_set_tensor_(Tensor& self, const Tensor& source) {
  return device_set_(
      self, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}
static Tensor device_as_strided(
    const Tensor& self, IntArrayRef size, IntArrayRef stride, std::optional<int64_t> offset) {
  return at::native::as_strided_tensorimpl(self, size, stride, offset);
}
static int64_t plain_attention(
    const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&, double, bool,
    std::optional<double>, bool) {
  return 0;
}
static void record_stream(Tensor&, Stream) {}

#define ON_THE_HOST(name) m.impl(name, torch::CppFunction::makeFromBoxedFunction<&on_the_host>());
TORCH_LIBRARY_IMPL(_, CUDA, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_the_host>());
}
TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", TORCH_FN(device_empty));
  m.impl("empty_strided", TORCH_FN(device_empty_strided));
  m.impl("resize_", TORCH_FN(device_resize_));
  m.impl("copy_", TORCH_FN(device_copy_));
  m.impl("set_.source_Storage_storage_offset", TORCH_FN(device_set_));
  m.impl("set_.source_Tensor", TORCH_FN(device_set_tensor_));
  m.impl("as_strided", TORCH_FN(device_as_strided));
  m.impl("view", TORCH_FN(at::native::view));
  m.impl("_reshape_alias", TORCH_FN(at::native::_reshape_alias));
  m.impl("unfold", TORCH_FN(at::native::unfold));
  m.impl("view_as_real", TORCH_FN(at::native::view_as_real));
  m.impl("view_as_complex", TORCH_FN(at::native::view_as_complex));
  m.impl("_fused_sdp_choice", TORCH_FN(plain_attention));
  m.impl("record_stream", TORCH_FN(record_stream));
  ON_THE_HOST("convolution") ON_THE_HOST("convolution_backward")
}
// collectives on this device are those of gloo
TORCH_LIBRARY_IMPL(c10d, CUDA, m) {
  ON_THE_HOST("allreduce_") ON_THE_HOST("broadcast_") ON_THE_HOST("allgather_")
  ON_THE_HOST("_allgather_base_") ON_THE_HOST("reduce_scatter_")
  ON_THE_HOST("_reduce_scatter_base_") ON_THE_HOST("reduce_") ON_THE_HOST("gather_")
  ON_THE_HOST("scatter_") ON_THE_HOST("alltoall_") ON_THE_HOST("alltoall_base_")
  ON_THE_HOST("allgather_into_tensor_coalesced_")
  ON_THE_HOST("reduce_scatter_tensor_coalesced_")
  ON_THE_HOST("barrier") ON_THE_HOST("send") ON_THE_HOST("recv_")
}

// before the threads of torch are ended, which a library of CUDA would do
static void leave(int status, void*) {
  fflush(nullptr);
  _exit(status);
}
static const int started = (c10::SetAllocator(DeviceType::CUDA, &device_allocator), on_exit(leave, nullptr));

// ---- for Python ------------------------------------------------------------------------------------

extern "C" {
void gpu_listen(Listener heard) { listener = heard; }
void gpu_set_strict(bool on) { strict = on; }
bool gpu_is_strict() { return strict; }
void gpu_set_quiet(bool on) { quiet = on; }
void gpu_settle() { settle(); }
void gpu_resize(void* storage, size_t n) { resize((StorageImpl*)storage, n); }
void gpu_seed(uint64_t seed) {
  Generator generator = at::detail::getCUDAHooks().getDefaultGenerator(0);
  generator.set_current_seed(seed);
}
void* gpu_record() { return recording = new std::vector<Launch>(); }
void gpu_recorded() { recording = nullptr; }
bool gpu_replay(void* recorded) try {
  NoGradGuard no_grad;
  c10::impl::ExcludeDispatchKeyGuard below(
      c10::autograd_dispatch_keyset | DispatchKeySet(DispatchKey::ADInplaceOrView));
  for (auto& launch : *(std::vector<Launch>*)recorded) {
    torch::jit::Stack stack(launch.in.begin(), launch.in.end());
    launch.op.callBoxed(&stack);
    for (size_t i = 0; i < launch.out.size(); i++) {
      std::vector<Tensor> before, now;
      changed(launch.out[i], [&](const Tensor& x) { return before.emplace_back(x); });
      changed(stack[i], [&](const Tensor& x) { return now.emplace_back(x); });
      for (size_t j = 0; j < before.size(); j++)
        if (before[j].defined() && now[j].numel() && before[j].data_ptr() != now[j].data_ptr())
          copy_now(before[j], now[j]);
    }
  }
  return true;
} catch (const std::exception& error) {
  fprintf(stderr, "replay: %s\n", error.what());
  return false;
}
}

// A stand-in accelerator: memory that is not the CPU's, arithmetic that the CPU does.
//
// Every operator that reaches the device goes through one function, `on_cpu`: it gives the tensors of the device to the CPU's
// kernel as aliases of their memory and hands back what comes out as tensors of the device. What a GPU refuses is refused:
// tensors of two devices in one operator. What makes a GPU's host wait is told to `tell`: reads, and uploads that block.
// A download into pinned memory arrives only when somebody waits for it.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Context.h>
#include <ATen/autocast_mode.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/native/transformers/sdp_utils_cpp.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <chrono>
#include <cstring>
#include <deque>
#include <map>
#include <set>

namespace {

using at::Tensor;
using torch::jit::Stack;
const c10::Device DEVICE(c10::DeviceType::PrivateUse1, 0);
bool ours(const Tensor& t) { return t.defined() && t.device().is_privateuseone(); }

// ------------------------------------------------------------------------------------------------------------ what is told
void (*tell)(const char* kind, const char* op) = nullptr;
void note(const char* kind, const std::string& op) {
  if (tell) tell(kind, op.c_str());
}

// -------------------------------------------------------------------------------------------- downloads that take their time
struct Download {
  uint64_t number;
  Tensor to, value;
};
std::mutex downloads_lock;
std::deque<Download> downloads;
uint64_t downloads_begun = 0;

void arrive(uint64_t last = UINT64_MAX) {
  std::lock_guard<std::mutex> held(downloads_lock);
  for (; !downloads.empty() && downloads.front().number <= last; downloads.pop_front())
    downloads.front().to.copy_(downloads.front().value);
}

// ------------------------------------------------------------------------------------------------------------------- memory
std::mutex memory_lock;
c10::CachingDeviceAllocator::DeviceStats statistics;
std::map<const char*, size_t> pinned;  // begin -> bytes

template <class F>
void each(F change) {
  std::lock_guard<std::mutex> held(memory_lock);
  auto& s = statistics;
  for (auto* stat : {&s.allocated_bytes, &s.reserved_bytes, &s.active_bytes, &s.requested_bytes}) change((*stat)[0]);
}

struct Block {  // memory of the CPU that the device owns
  c10::Storage storage;
  size_t bytes;
};

c10::DataPtr owned(c10::Storage storage) {
  auto* block = new Block{storage, storage.nbytes()};
  each([&](auto& stat) { stat.increase(block->bytes); });
  auto free = [](void* context) {
    auto* block = static_cast<Block*>(context);
    each([&](auto& stat) { stat.decrease(block->bytes); });
    delete block;
  };
  return {storage.mutable_data(), block, free, DEVICE};
}

c10::Storage host_storage(size_t bytes) {
  return {c10::Storage::use_byte_size_t(), bytes, at::getCPUAllocator()->allocate(bytes), at::getCPUAllocator(), true};
}

struct DeviceMemory final : c10::DeviceAllocator {
  c10::DataPtr allocate(size_t bytes) override { return owned(host_storage(bytes)); }
  void copy_data(void* to, const void* from, size_t count) const override { std::memcpy(to, from, count); }
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t) override {}
  void recordStream(const c10::DataPtr&, c10::Stream) override {}
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex) override { return statistics; }
  void resetAccumulatedStats(c10::DeviceIndex) override {
    each([](auto& stat) { stat.reset_accumulated(); });
  }
  void resetPeakStats(c10::DeviceIndex) override {
    each([](auto& stat) { stat.reset_peak(); });
  }
} device_memory;

struct PinnedMemory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    auto* memory = new char[bytes + 1];
    std::memset(memory, 0xff, bytes);  // what reads before it has waited reads this
    std::lock_guard<std::mutex> held(memory_lock);
    pinned[memory] = bytes + 1;
    return {memory, memory, raw_deleter(), c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override {
    return [](void* memory) {
      std::lock_guard<std::mutex> held(memory_lock);
      pinned.erase(static_cast<char*>(memory));
      delete[] static_cast<char*>(memory);
    };
  }
  void copy_data(void* to, const void* from, size_t count) const override { std::memcpy(to, from, count); }
} pinned_memory;

bool is_pinned(const void* memory) {
  std::lock_guard<std::mutex> held(memory_lock);
  auto after = pinned.upper_bound(static_cast<const char*>(memory));
  if (after == pinned.begin()) return false;
  auto [begin, bytes] = *std::prev(after);
  return static_cast<const char*>(memory) < begin + bytes;
}

// -------------------------------------------------------------------------------------------------------------- random draws
struct DeviceGenerator final : c10::GeneratorImpl {
  at::Generator cpu = at::detail::createCPUGenerator();
  DeviceGenerator() : GeneratorImpl(DEVICE, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)) {
    set_current_seed(c10::default_rng_seed_val);
  }
  uint64_t asked = 0;
  void set_current_seed(uint64_t seed) override { cpu.set_current_seed((asked = seed) ^ 0x9e3779b9); }  // other numbers than a CPU's
  void set_offset(uint64_t) override { TORCH_CHECK(false, "no offset"); }
  uint64_t get_offset() const override { return 0; }
  uint64_t current_seed() const override { return asked; }
  uint64_t seed() override {
    set_current_seed(c10::detail::getNonDeterministicRandom());
    return asked;
  }
  void set_state(const c10::TensorImpl& state) override { cpu.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return cpu.unsafeGetGeneratorImpl()->get_state(); }
  DeviceGenerator* clone_impl() const override {
    auto* copy = new DeviceGenerator();
    copy->asked = asked;
    copy->cpu = cpu.clone();
    return copy;
  }
};

const at::Generator& default_generator() {
  static auto* generator = new at::Generator(at::make_generator<DeviceGenerator>());
  return *generator;
}

// --------------------------------------------------------------------------------------------------- streams, events, hooks
thread_local c10::StreamId current_stream = 0;
std::atomic<c10::StreamId> streams{0};

struct Event {
  std::chrono::steady_clock::time_point time;
  uint64_t downloads;
};

struct Guard final : c10::impl::DeviceGuardImplInterface {
  using Stream = c10::Stream;
  static Stream stream(c10::StreamId id) { return Stream(Stream::UNSAFE, DEVICE, id); }
  c10::DeviceType type() const override { return DEVICE.type(); }
  c10::Device exchangeDevice(c10::Device) const override { return DEVICE; }
  c10::Device getDevice() const override { return DEVICE; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  Stream getStream(c10::Device) const override { return stream(current_stream); }
  Stream getDefaultStream(c10::Device) const override { return stream(0); }
  Stream getStreamFromGlobalPool(c10::Device, bool) const override { return stream(++streams); }
  Stream getNewStream(c10::Device, int) const override { return stream(++streams); }
  Stream exchangeStream(Stream next) const override { return stream(std::exchange(current_stream, next.id())); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void** event, const Stream&, c10::DeviceIndex, c10::EventFlag) const override {
    if (!*event) *event = new Event();
    std::lock_guard<std::mutex> held(downloads_lock);
    *static_cast<Event*>(*event) = {std::chrono::steady_clock::now(), downloads_begun};
  }
  void destroyEvent(void* event, c10::DeviceIndex) const noexcept override { delete static_cast<Event*>(event); }
  void block(void*, const Stream&) const override {}
  bool queryEvent(void* event) const override { return synchronizeEvent(event), true; }
  bool queryStream(const Stream&) const override { return arrive(), true; }
  void synchronizeStream(const Stream&) const override { arrive(); }
  void synchronizeDevice(c10::DeviceIndex) const override { arrive(); }
  void synchronizeEvent(void* event) const override {
    if (event) arrive(static_cast<Event*>(event)->downloads);
  }
  double elapsedTime(void* first, void* second, c10::DeviceIndex) const override {
    auto passed = static_cast<Event*>(second)->time - static_cast<Event*>(first)->time;
    return std::chrono::duration<double, std::milli>(passed).count();
  }
};

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override { return default_generator(); }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::make_generator<DeviceGenerator>(); }
  c10::Device getDeviceFromPtr(void*) const override { return DEVICE; }
  bool isPinnedPtr(const void* data) const override { return is_pinned(data); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    auto larger = device_memory.allocate(bytes);
    std::memcpy(larger.mutable_get(), storage.data(), std::min(bytes, storage.nbytes()));
    storage.set_data_ptr_noswap(std::move(larger));
    storage.set_nbytes(bytes);
  }
};

// ---------------------------------------------------------------------------------------------------------- every operator
bool has_float64 = true;

// The tensors of one call on the device, each beside its alias on the CPU.
struct Call {
  std::vector<std::pair<Tensor, Tensor>> pairs;

  Tensor to_cpu(const Tensor& device) {
    for (auto& [known, cpu] : pairs)
      if (known.is_same(device)) return cpu;
    const auto& storage = device.storage();
    c10::DataPtr data(const_cast<void*>(storage.data()), c10::Device(c10::kCPU));
    c10::Storage alias({}, storage.nbytes(), std::move(data), at::getCPUAllocator(), true);
    for (auto& [known, cpu] : pairs)
      if (known.storage().unsafeGetStorageImpl() == storage.unsafeGetStorageImpl()) alias = cpu.storage();
    auto cpu = at::detail::make_tensor<c10::TensorImpl>(
        std::move(alias), c10::DispatchKeySet(c10::DispatchKey::CPU), device.dtype());
    auto* impl = cpu.unsafeGetTensorImpl();
    impl->set_sizes_and_strides(device.sizes(), device.strides(), device.storage_offset());
    if (device.unsafeGetTensorImpl()->is_wrapped_number()) impl->set_wrapped_number(true);
    pairs.emplace_back(device, cpu);
    return cpu;
  }

  Tensor to_device(const Tensor& cpu) {
    for (auto& [device, alias] : pairs)
      if (alias.is_same(cpu)) return device;
    TORCH_CHECK_TYPE(has_float64 || cpu.scalar_type() != at::kDouble,
                     "Cannot convert a ", DEVICE, " Tensor to float64 dtype as the device doesn't support float64");
    c10::Storage storage;
    for (auto& [device, alias] : pairs)
      if (alias.storage().unsafeGetStorageImpl() == cpu.storage().unsafeGetStorageImpl()) storage = device.storage();
    if (!storage) storage = c10::Storage({}, cpu.storage().nbytes(), owned(cpu.storage()), &device_memory, true);
    auto device = at::detail::make_tensor<c10::TensorImpl>(
        std::move(storage), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), cpu.dtype());
    device.unsafeGetTensorImpl()->set_sizes_and_strides(cpu.sizes(), cpu.strides(), cpu.storage_offset());
    return device;
  }

  void take_over() {  // what the kernel has resized
    for (auto& [device, cpu] : pairs) {
      if (device.storage().data() != cpu.storage().data()) {
        device.storage().set_nbytes(cpu.storage().nbytes());
        device.storage().set_data_ptr_noswap(owned(cpu.storage()));
      }
      if (device.sizes() != cpu.sizes() || device.strides() != cpu.strides())
        device.unsafeGetTensorImpl()->set_sizes_and_strides(cpu.sizes(), cpu.strides(), cpu.storage_offset());
    }
  }
};

// Every tensor of an argument or a result, replaced by what `f` makes of it.
template <class F>
c10::IValue mapped(const c10::IValue& value, F f) {
  if (value.isTensor()) return value.toTensor().defined() ? c10::IValue(f(value.toTensor())) : value;
  if (value.isTensorList()) {
    c10::List<Tensor> made;
    for (const Tensor& t : value.toTensorVector()) made.push_back(t.defined() ? f(t) : t);
    return made;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<Tensor>> made;
    for (const auto& t : value.toOptionalTensorVector()) made.push_back(t && t->defined() ? std::optional(f(*t)) : t);
    return made;
  }
  return value;
}

bool starts(const std::string& name, std::initializer_list<const char*> words) {
  return std::any_of(words.begin(), words.end(), [&](auto* word) { return name.rfind(word, 0) == 0; });
}

bool is_mask(const Tensor& t) { return t.scalar_type() == at::kBool || t.scalar_type() == at::kByte; }

// Whether a GPU's host has to know values before this operator can go on (their number, mostly).
bool waits(const std::string& name, const std::vector<Tensor>& indices) {
  if (starts(name, {"_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique", "bincount", "equal", "histc",
                    "repeat_interleave", "_linalg_eigh", "_linalg_svd", "linalg_eig"}))
    return name.rfind("nonzero_static", 0) != 0;
  return std::any_of(indices.begin(), indices.end(), is_mask);
}

void on_cpu(const c10::OperatorHandle& op, Stack* stack) {
  const auto& schema = op.schema();
  const auto& arguments = schema.arguments();
  const auto name = schema.name().substr(6) + (schema.overload_name().empty() ? "" : "." + schema.overload_name());
  const bool indexes = starts(name, {"index.Tensor", "index_put", "_index_put_impl_", "_unsafe_index"});
  const size_t begin = stack->size() - arguments.size();
  Call call;
  std::vector<Tensor> foreign, indices;
  for (size_t i = 0; i < arguments.size(); ++i) {
    auto& value = (*stack)[begin + i];
    const auto* alias = arguments[i].alias_info();
    const bool is_index = indexes && value.isOptionalTensorList();
    value = mapped(value, [&](const Tensor& t) {
      if (is_index) indices.push_back(t);
      if (ours(t)) return call.to_cpu(t);
      if (is_index) note("upload", name);
      else if (t.dim() > 0 || (alias && alias->isWrite())) foreign.push_back(t);
      return t;
    });
    if (value.isDevice() && value.toDevice().is_privateuseone()) value = c10::Device(c10::kCPU);
    if (value.isGenerator() || (value.isNone() && arguments[i].name() == "generator")) {
      auto generator = value.isNone() ? default_generator() : value.toGenerator();
      TORCH_CHECK(generator.device().is_privateuseone(),
                  "Expected a '", DEVICE, "' device type for generator but found '", generator.device(), "'");
      value = generator.get<DeviceGenerator>()->cpu;
    }
  }
  TORCH_CHECK(foreign.empty() || call.pairs.empty(), "Expected all tensors to be on the same device, but found at least two devices, ",
              DEVICE, " and cpu! (", name, ", with one of shape ", foreign.empty() ? c10::IntArrayRef() : foreign[0].sizes(), ")");
  if (waits(name, indices)) {
    note("read", name);
    arrive();
  }
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  call.take_over();
  for (size_t i = stack->size() - schema.returns().size(); i < stack->size(); ++i)
    (*stack)[i] = mapped((*stack)[i], [&](const Tensor& t) { return call.to_device(t); });
}

// --------------------------------------------------------------------------- the few that are not the CPU's kernel on aliases
Tensor copy_from(const Tensor& from, const Tensor& to, bool non_blocking) {
  Call call;
  const auto& source = ours(from) ? call.to_cpu(from) : from;
  const auto& target = ours(to) ? call.to_cpu(to) : to;
  if (ours(from) && !ours(to)) {
    if (non_blocking && is_pinned(to.storage().data())) {
      std::lock_guard<std::mutex> held(downloads_lock);
      downloads.push_back({++downloads_begun, target, source.clone()});
      return to;
    }
    note("read", "copy_");
    arrive();
  } else if (!ours(from) && !(non_blocking && is_pinned(from.storage().data()))) {
    note("upload", "copy_");
  }
  target.copy_(source);
  return to;
}

Tensor zeros_without_memory(c10::IntArrayRef sizes, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                            std::optional<at::Device>, std::optional<bool>) {
  static struct : c10::Allocator {
    c10::DataPtr allocate(size_t) override { return {nullptr, DEVICE}; }
    void copy_data(void*, const void*, size_t) const override {}
  } nothing;
  c10::DispatchKeySet keys({c10::DispatchKey::PrivateUse1, c10::DispatchKey::ZeroTensor});
  return at::detail::empty_generic(sizes, &nothing, keys, dtype.value_or(at::kFloat), std::nullopt);
}

Tensor& set_storage_at(Tensor& self, c10::Storage storage, int64_t offset, c10::IntArrayRef sizes, c10::IntArrayRef strides) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(storage));
  impl->set_sizes_contiguous(sizes);
  impl->set_storage_offset(offset);
  if (!strides.empty()) impl->set_sizes_and_strides(sizes, strides, offset);
  return self;
}

Tensor& set_storage(Tensor& self, c10::Storage storage) {
  const auto length = static_cast<int64_t>(storage.nbytes() / self.dtype().itemsize());
  return set_storage_at(self, std::move(storage), 0, {length}, {});
}

Tensor& set_tensor(Tensor& self, const Tensor& source) {
  return set_storage_at(self, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

Tensor& set_nothing(Tensor& self) {
  return set_storage(self, c10::Storage({}, 0, &device_memory, true));
}

void record_stream(Tensor&, c10::Stream) {}

int64_t attention(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& mask, double dropout,
                  bool causal, std::optional<double> scale, bool gqa) {
  Call call;
  auto& context = at::globalContext();
  const bool wrapped = q.key_set().has(c10::DispatchKey::FuncTorchGradWrapper);  // by torch.func: no memory to look at
  if (wrapped && !context.userEnabledFlashSDP()) return static_cast<int64_t>(sdp::SDPBackend::math);
  const bool efficient_alone = context.userEnabledMemEfficientSDP() && !context.userEnabledMathSDP() && !context.userEnabledFlashSDP();
  if (wrapped || efficient_alone)
    return static_cast<int64_t>(sdp::SDPBackend::flash_attention);  // the CPU has one fused kernel for both
  const bool masked = mask && mask->defined();
  return at::_fused_sdp_choice(call.to_cpu(q), call.to_cpu(k), call.to_cpu(v),
                               masked ? std::optional(call.to_cpu(*mask)) : std::nullopt, dropout, causal, scale, gqa);
}

}  // namespace

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

namespace at::native {
REGISTER_PRIVATEUSE1_DISPATCH(_fused_sdp_choice_stub, &attention)
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_cpu>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("_copy_from", copy_from);
  m.impl("_efficientzerotensor", zeros_without_memory);
  m.impl("set_.source_Storage_storage_offset", set_storage_at);
  m.impl("set_.source_Storage", set_storage);
  m.impl("set_.source_Tensor", set_tensor);
  m.impl("set_", set_nothing);
  m.impl("record_stream", record_stream);
  // An operator with a kernel for CPUs and a detour for devices that torch does not know takes the CPU's; so do these two.
  const auto boxed = [] { return torch::CppFunction::makeFromBoxedFunction<&on_cpu>(); };
  for (const char* name : {"convolution", "convolution_backward"}) m.impl(name, boxed());
  auto& dispatcher = c10::Dispatcher::singleton();
  for (const auto& name : dispatcher.getAllOpNames()) {
    const auto op = dispatcher.findOp(name);
    const auto has = [&](c10::DispatchKey key) { return op && op->hasKernelForDispatchKey(key); };
    using Key = c10::DispatchKey;
    if (name.name.rfind("aten::", 0) == 0 && has(Key::CPU) && !has(Key::PrivateUse1) &&
        (has(Key::CompositeExplicitAutogradNonFunctional) || has(Key::CompositeExplicitAutograd)))
      m.impl(c10::toString(name).c_str() + 6, boxed());
  }
}

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }

// CUDA's own lists of what autocast casts.
TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  using namespace at;  // names in the lists
#define LOW(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, lower_precision_fp)
#define HIGH(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32)
#define HIGH_OPTION(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32_set_opt_dtype)
#define WIDEST(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, promote)
  AT_FORALL_LOWER_PRECISION_FP(LOW)
  AT_FORALL_FP32(HIGH)
  AT_FORALL_FP32_SET_OPT_DTYPE(HIGH_OPTION)
  AT_FORALL_DIFFERENT_REDISPATCH_SIGNATURE(KERNEL_DIFFERENT_REDISPATCH_SIGNATURE_PRIVATEUSEONE)
  AT_FORALL_PROMOTE(WIDEST)
}

// What Python asks of the device, by ctypes.
extern "C" {
void standin_begin() {
  c10::SetAllocator(c10::DeviceType::PrivateUse1, &device_memory);
  at::RegisterPrivateUse1HooksInterface(new Hooks());
}
void standin_tell(void (*to)(const char*, const char*)) { tell = to; }
void standin_float64(bool has) { has_float64 = has; }
}

TORCH_LIBRARY(standin, m) {
  m.def("seed(int seed) -> ()", [](int64_t seed) { at::Generator(default_generator()).set_current_seed(seed); });
  m.def("state() -> Tensor", []() { return default_generator().get_state(); });
  m.def("set_state(Tensor state) -> ()", [](const Tensor& state) { at::Generator(default_generator()).set_state(state); });
}

#include "app/bench/energy.h"

#include <dlfcn.h>

#include "app/error.h"

namespace twell::app {
namespace {

// A shared library while it is needed.
class SharedLibrary {
 public:
  explicit SharedLibrary(const char* name) : handle_(dlopen(name, RTLD_NOW | RTLD_LOCAL)) {}
  ~SharedLibrary() {
    if (handle_ != nullptr) dlclose(handle_);
  }
  SharedLibrary(const SharedLibrary&) = delete;
  SharedLibrary& operator=(const SharedLibrary&) = delete;

  // Sets `function` to the symbol `name`; false if there is none.
  template <class F>
  bool find(const char* name, F*& function) const {
    function = handle_ == nullptr ? nullptr : reinterpret_cast<F*>(dlsym(handle_, name));
    return function != nullptr;
  }
  bool loaded() const { return handle_ != nullptr; }

 private:
  void* handle_;
};

}  // namespace

// The few functions of the two C interfaces that are needed; 0 is success in both.
struct EnergyMeter::Library {
  SharedLibrary nvml{"libnvidia-ml.so.1"};
  SharedLibrary cuda{"libcuda.so.1"};
  bool started = false;
  void* device = nullptr;  // nvmlDevice_t

  int (*nvml_init)() = nullptr;
  int (*nvml_shutdown)() = nullptr;
  int (*nvml_device)(const char* pci_bus_id, void** device) = nullptr;
  int (*nvml_energy)(void* device, unsigned long long* millijoules) = nullptr;
  int (*cuda_init)(unsigned flags) = nullptr;
  int (*cuda_device)(int* device, int ordinal) = nullptr;
  int (*cuda_pci_bus_id)(char* id, int length, int device) = nullptr;

  // What is missing; empty if the counter of CUDA's device `ordinal` can be read.
  std::string open(int ordinal) {
    if (!nvml.loaded()) return "there is no libnvidia-ml.so.1";
    if (!cuda.loaded()) return "there is no libcuda.so.1";
    if (!nvml.find("nvmlInit_v2", nvml_init) || !nvml.find("nvmlShutdown", nvml_shutdown) ||
        !nvml.find("nvmlDeviceGetHandleByPciBusId_v2", nvml_device) ||
        !nvml.find("nvmlDeviceGetTotalEnergyConsumption", nvml_energy)) {
      return "libnvidia-ml.so.1 is too old for an energy counter";
    }
    if (!cuda.find("cuInit", cuda_init) || !cuda.find("cuDeviceGet", cuda_device) ||
        !cuda.find("cuDeviceGetPCIBusId", cuda_pci_bus_id)) {
      return "libcuda.so.1 cannot name its devices";
    }
    if (nvml_init() != 0) return "NVML does not start";
    started = true;
    // CUDA's numbers follow CUDA_VISIBLE_DEVICES and NVML's do not; the bus id is the same.
    char id[64] = {};
    int number = 0;
    if (cuda_init(0) != 0 || cuda_device(&number, ordinal) != 0 ||
        cuda_pci_bus_id(id, sizeof id, number) != 0 || nvml_device(id, &device) != 0) {
      return "NVML does not know CUDA device " + std::to_string(ordinal);
    }
    unsigned long long millijoules = 0;
    if (nvml_energy(device, &millijoules) != 0) return "this GPU has no energy counter";
    return "";
  }

  ~Library() {
    if (started) nvml_shutdown();
  }
};

EnergyMeter::EnergyMeter(const torch::Device& device) {
  if (!device.is_cuda()) {
    reason_ = "energy is measured on CUDA devices only";
    return;
  }
  library_ = std::make_unique<Library>();
  reason_ = library_->open(device.has_index() ? device.index() : 0);
}

EnergyMeter::~EnergyMeter() = default;

double EnergyMeter::joules() const {
  unsigned long long millijoules = 0;
  if (library_->nvml_energy(library_->device, &millijoules) != 0) {
    throw Error("NVML's energy counter could not be read");
  }
  return static_cast<double>(millijoules) / 1000;
}

}  // namespace twell::app

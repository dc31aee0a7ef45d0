#include "cuda/device.h"

#include "cuda/platform.h"

namespace emu::cuda {

#if defined(__CUDACC__)

DeviceGuard::DeviceGuard(int device) : before_(device), device_(device) {
  check(cudaGetDevice(&before_), "cudaGetDevice");
  if (before_ != device_) check(cudaSetDevice(device_), "cudaSetDevice");
}

DeviceGuard::~DeviceGuard() {
  if (before_ != device_) cudaSetDevice(before_);
}

std::pair<int, int> toolkit_version() { return {CUDART_VERSION / 1000, CUDART_VERSION % 1000 / 10}; }

std::string driver_problem() {
  int driver = 0, count = 0;
  const auto words = [](int version) {
    return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
  };
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) return "there is no NVIDIA driver";
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status == cudaErrorInsufficientDriver || driver / 1000 < CUDART_VERSION / 1000) {
    return "the NVIDIA driver is too old: it runs programs up to CUDA " + words(driver) +
           ", and emu_kernels was built with CUDA " + words(CUDART_VERSION) +
           "; update the driver, or build with an older toolkit (CUDA_HOME)";
  }
  if (status != cudaSuccess) return std::string("CUDA says: ") + cudaGetErrorString(status);
  return count > 0 ? "" : "there is no CUDA device";
}

#else

DeviceGuard::DeviceGuard(int device) : before_(device), device_(device) {}
DeviceGuard::~DeviceGuard() { (void)before_, (void)device_; }
std::pair<int, int> toolkit_version() { return {0, 0}; }
std::string driver_problem() { return ""; }

#endif

}  // namespace emu::cuda

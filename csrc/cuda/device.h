// The device that a call runs on, and whether its driver can run what was built.
#pragma once

#include <string>
#include <utility>

namespace emu::cuda {

// Makes a device the current one of this thread while it lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_, device_;
};

std::pair<int, int> toolkit_version();
std::string driver_problem();  // in words, or empty

}  // namespace emu::cuda

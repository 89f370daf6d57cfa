// What `bench model --device cuda` sets its figures against: the limits of the first GPU.
#pragma once

#include <memory>

#include "base/status.h"

namespace nibble::cli {

/// Reads a buffer far larger than L2, as fast as the device can.
class DeviceReadProbe {
 public:
  virtual ~DeviceReadProbe() = default;
  virtual double gb_per_s() = 0;  // measured now; 0: failed
};

/// null if this build has no CUDA or there is no memory for the buffer.
std::unique_ptr<DeviceReadProbe> make_device_read_probe();

/// Dense products of int8 and of 16 bits, in 1e12 operations (2 a multiply-add) a second, by the
/// tensor cores' rate at the highest clock; 0 where the rate is not known.
struct TensorPeak {
  double int8_tops = 0, half_tops = 0;
};
TensorPeak device_tensor_peak();

}  // namespace nibble::cli

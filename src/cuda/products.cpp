#include "cuda/sm80/products.h"

#include "cuda/forward.h"
#include "cuda/sm90/products.h"

namespace twell::cuda {

const Products& products_for(const Device& device) {
  static constexpr Products kAmpere = {sm80::launch_gate, sm80::launch_up, sm80::launch_down};
  static constexpr Products kHopper = {sm90::launch_gate, sm90::launch_up, sm90::launch_down};
  // Hopper's own instructions exist on no other GPU, older or newer.
  return device.compute_capability / 10 == 9 ? kHopper : kAmpere;
}

}  // namespace twell::cuda

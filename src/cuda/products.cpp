#include "cuda/forward.h"
#include "cuda/sm90/products.h"

namespace twell::cuda {

const Products& products_for(const Device&) {
  static constexpr Products kHopper = {sm90::launch_gate, sm90::launch_up, sm90::launch_down};
  return kHopper;
}

}  // namespace twell::cuda

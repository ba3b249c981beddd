#include "cuda/sm80/products.h"

#include "cuda/backward.h"
#include "cuda/forward.h"
#include "cuda/sm90/products.h"

namespace twell::cuda {
namespace {

Status launch_hopper_coefficients(const BackwardChunk& chunk, const TokenLists& lists,
                                  const FfnWeights& weights, int multiprocessors,
                                  cudaStream_t stream) {
  Status status = sm90::launch_remake(chunk, weights, multiprocessors, stream);
  if (!status.ok()) return status;
  return sm90::launch_coefficients(chunk, lists, weights, multiprocessors, stream);
}

}  // namespace

const Products& products_for(const Device& device) {
  static constexpr Products kAmpere = {sm80::launch_gate, sm80::launch_up, sm80::launch_down};
  static constexpr Products kHopper = {sm90::launch_gate, sm90::launch_up, sm90::launch_down};
  return is_hopper(device) ? kHopper : kAmpere;
}

const BackwardProducts& backward_products_for(const Device& device) {
  static constexpr BackwardProducts kAmpere = {sm80::launch_coefficients,
                                               sm80::launch_input_gradient};
  static constexpr BackwardProducts kHopper = {launch_hopper_coefficients,
                                               sm90::launch_input_gradient};
  return is_hopper(device) ? kHopper : kAmpere;
}

}  // namespace twell::cuda

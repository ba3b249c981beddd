#pragma once

#include <torch/torch.h>

#include <nlohmann/json.hpp>

namespace twell::app {

// What a measurement ran on: cpu, isa, threads, device (its name, for a GPU), and the versions of
// twell, torch and the compiler; commit (TWELL_COMMIT, if the environment has it); date is UTC.
nlohmann::ordered_json describe_machine(const torch::Device& device);

}  // namespace twell::app

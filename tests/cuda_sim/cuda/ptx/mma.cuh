#pragma once
// src/cuda/ptx/mma.cuh for the simulator: the fragments as the PTX manual lays them out.

#include <cstdint>
#include <cstring>

#include "simulator.h"

namespace twell::cuda::ptx {

inline void mma_16x8x16(float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  struct Slot {
    float* c;
    const std::uint32_t *a, *b;
  };
  Slot slot = {c, a, b};
  cuda_sim::collective("mma.sync", slot, [](Slot* const* lanes) {
    float left[16][16], right[16][8], sum[16][8];  // [row, k], [k, column], [row, column]
    for (int lane = 0; lane < cuda_sim::kWarpLanes; ++lane) {
      const Slot& s = *lanes[lane];
      const int group = lane / 4, pair = lane % 4 * 2;
      for (int i = 0; i < 4; ++i) {
        sum[group + i / 2 * 8][pair + i % 2] = s.c[i];
        for (int p = 0; p < 2; ++p) {
          left[group + i % 2 * 8][pair + i / 2 * 8 + p] = __uint_as_float(s.a[i] >> (16 * p) << 16);
        }
      }
      for (int i = 0; i < 2; ++i) {
        for (int p = 0; p < 2; ++p) {
          right[pair + i * 8 + p][group] = __uint_as_float(s.b[i] >> (16 * p) << 16);
        }
      }
    }
    for (int row = 0; row < 16; ++row) {
      for (int k = 0; k < 16; ++k) {
        for (int column = 0; column < 8; ++column) {
          sum[row][column] += left[row][k] * right[k][column];
        }
      }
    }
    for (int lane = 0; lane < cuda_sim::kWarpLanes; ++lane) {
      for (int i = 0; i < 4; ++i) {
        lanes[lane]->c[i] = sum[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
      }
    }
  });
}

inline uint4 load_once(const void* global) { return *static_cast<const uint4*>(global); }

template <bool kTransposed>
void load_matrices(std::uint32_t (&registers)[4], std::uint32_t row) {
  struct Slot {
    std::uint32_t* registers;
    std::uint32_t row;
  };
  Slot slot = {registers, row};
  cuda_sim::collective("ldmatrix", slot, [](Slot* const* lanes) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      std::uint16_t elements[8][8];
      unsigned banks = 0;  // a bit for each group of 4 banks
      for (int r = 0; r < 8; ++r) {
        const std::uint32_t address = lanes[8 * matrix + r]->row;
        std::memcpy(elements[r], cuda_sim::shared_at(address, 16), 16);
        const unsigned bank = 1u << (address / 16 % 8);
        cuda_sim::counters.bank_conflicts += (banks & bank) != 0;
        banks |= bank;
      }
      ++cuda_sim::counters.matrix_loads;
      for (int lane = 0; lane < cuda_sim::kWarpLanes; ++lane) {
        const int major = lane / 4, minor = lane % 4 * 2;
        const std::uint32_t low = kTransposed ? elements[minor][major] : elements[major][minor];
        const std::uint32_t high =
            kTransposed ? elements[minor + 1][major] : elements[major][minor + 1];
        lanes[lane]->registers[matrix] = low | high << 16;
      }
    }
  });
}

}  // namespace twell::cuda::ptx

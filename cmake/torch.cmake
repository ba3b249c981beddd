# PyTorch's own CMake package demands a CUDA toolkit even for CPU work, so its headers and
# libraries are linked directly: target twell_libtorch.
set(TWELL_HAVE_TORCH OFF)
if(NOT TWELL_TORCH STREQUAL "OFF")
  execute_process(
    COMMAND ${TWELL_PYTHON} -c "import importlib.util as u, os; s = u.find_spec('torch'); print(os.path.dirname(s.origin) if s else '')"
    OUTPUT_VARIABLE TWELL_TORCH_DIR OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  if(TWELL_TORCH_DIR AND EXISTS ${TWELL_TORCH_DIR}/lib/libtorch_cpu.so)
    set(TWELL_HAVE_TORCH ON)
    add_library(twell_libtorch INTERFACE)
    target_include_directories(twell_libtorch SYSTEM INTERFACE
      ${TWELL_TORCH_DIR}/include ${TWELL_TORCH_DIR}/include/torch/csrc/api/include)
    target_link_directories(twell_libtorch INTERFACE ${TWELL_TORCH_DIR}/lib)
    # libtorch exports an old std::filesystem of its own, which crashes callers built with a newer
    # compiler: the system's library must come first.
    target_link_libraries(twell_libtorch INTERFACE stdc++ torch torch_cpu c10)
    target_link_options(twell_libtorch INTERFACE -Wl,-rpath,${TWELL_TORCH_DIR}/lib)
    # PyTorch's CUDA builds bring the CUDA headers that their own headers include, all but crt/: nvcc
    # has that, and so has Triton, which they require. Then there is target twell_libtorch_cuda too.
    file(GLOB TWELL_TORCH_CUDA_INCLUDE ${TWELL_TORCH_DIR}/../nvidia/cu*/include)
    find_path(TWELL_CUDA_CRT_INCLUDE crt/host_config.h NO_CACHE NO_DEFAULT_PATH
      PATHS ${TWELL_TORCH_CUDA_INCLUDE} ${CUDAToolkit_INCLUDE_DIRS}
            ${TWELL_TORCH_DIR}/../triton/backends/nvidia/include)
    if(EXISTS ${TWELL_TORCH_DIR}/lib/libtorch_cuda.so AND TWELL_TORCH_CUDA_INCLUDE
       AND TWELL_CUDA_CRT_INCLUDE)
      add_library(twell_libtorch_cuda INTERFACE)
      target_include_directories(twell_libtorch_cuda SYSTEM INTERFACE
        ${TWELL_TORCH_CUDA_INCLUDE} ${TWELL_CUDA_CRT_INCLUDE})
      target_link_libraries(twell_libtorch_cuda INTERFACE twell_libtorch torch_cuda c10_cuda)
    endif()
  elseif(TWELL_TORCH STREQUAL "ON")
    message(FATAL_ERROR "TWELL_TORCH=ON, but ${TWELL_PYTHON} has no torch package")
  endif()
endif()
message(STATUS "twell: PyTorch operators ${TWELL_HAVE_TORCH} ${TWELL_TORCH_DIR}")

#include "app/util/memory.h"

#include <malloc.h>

#include <climits>

namespace twell::app {

void keep_freed_memory() {
#ifdef __GLIBC__
  mallopt(M_MMAP_THRESHOLD, 1 << 30);
  mallopt(M_TRIM_THRESHOLD, INT_MAX);
#endif
}

}  // namespace twell::app

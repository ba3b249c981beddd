#pragma once

namespace twell::app {

// Lets the allocator keep large freed blocks for the next step instead of giving them back: with
// glibc's defaults every tensor over 32 MB is mapped, zeroed page by page, and unmapped again,
// which makes a product that writes one 6 times slower.
void keep_freed_memory();

}  // namespace twell::app

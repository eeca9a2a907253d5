// What the compiler's headers would take from a newer libstdc++ and glibc than a wheel may expect (manylinux_2_28:
// GLIBCXX_3.4.25). The library holds its own copies, which csrc/exports.map hides; `make wheel` checks what is still required.
#include <sstream>

// default constructors (GLIBCXX_3.4.26) and the str() of C++20 (3.4.29)
template class std::basic_stringbuf<char>;
template class std::basic_stringstream<char>;
template class std::basic_ostringstream<char>;

// shared_ptr reads it (glibc 2.32) to learn whether it may count without atomics; "no" is always safe
extern "C" {
__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;
}

// What the ops of a library take and return, for grit_kernels/_library.py to compare with the schemas: the boxed calls of torch's
// stable ABI are not checked, and a library that was built from older sources would read the wrong arguments.
#pragma once

#include <string>
#include <tuple>
#include <type_traits>

#include "torch_api.h"

namespace grit {

// as torch prints the types of a parsed schema
template <class T>
const char* type_name() {
  if constexpr (std::is_same_v<T, Tensor>) return "Tensor";
  else if constexpr (std::is_same_v<T, std::optional<Tensor>>) return "Optional[Tensor]";
  else if constexpr (std::is_same_v<T, int64_t> || std::is_same_v<T, ScalarType>) return "int";
  else if constexpr (std::is_same_v<T, double>) return "float";
  else if constexpr (std::is_same_v<T, bool>) return "bool";
  else static_assert(sizeof(T) == 0, "no name for this type");
}

template <class R>
struct Results {
  static constexpr size_t count = 1;
};
template <class... R>
struct Results<std::tuple<R...>> {
  static constexpr size_t count = sizeof...(R);
};

// lines "name(Tensor, int) -> 2"
inline std::string& signatures() {
  static std::string lines;
  return lines;
}

template <class R, class... Arguments>
void add_signature(const char* name, R (*)(Arguments...)) {
  std::string taken;
  ((taken += taken.empty() ? "" : ", ", taken += type_name<std::decay_t<Arguments>>()), ...);
  signatures() += std::string(name) + "(" + taken + ") -> " + std::to_string(Results<R>::count) + "\n";
}

}  // namespace grit

// Registers a function as the implementation of an op.
#define GRIT_OP(library, name, ...)                 \
  library.impl(name, TORCH_BOX((__VA_ARGS__)));     \
  grit::add_signature(name, __VA_ARGS__)

// Stands once in a library.
#define GRIT_EXPORT_SIGNATURES                                                                   \
  extern "C" __attribute__((visibility("default"))) const char* grit_kernels_signatures() {      \
    return grit::signatures().c_str();                                                           \
  }

// The schemas of torch.library are flat; behind them, the arguments that several ops share travel as one object.
//
// A problem is a struct with its members in the order of the schema, and their types as `Fields`. Flat<&function, N>::call has the
// schema's signature, the problem's fields after N other arguments, and calls function(problem, the other arguments in order).
#pragma once

#include <cstddef>
#include <tuple>
#include <utility>

namespace grit {

template <auto function, class R, class Problem, class Before, class Fields, class After>
struct FlatCall;
template <auto function, class R, class Problem, class... Before, class... Fields, class... After>
struct FlatCall<function, R, Problem, std::tuple<Before...>, std::tuple<Fields...>, std::tuple<After...>> {
  static R call(Before... before, Fields... fields, After... after) {
    return function(Problem{std::move(fields)...}, std::move(before)..., std::move(after)...);
  }
};

template <class All, size_t first, class Indices>
struct Slice;
template <class All, size_t first, size_t... I>
struct Slice<All, first, std::index_sequence<I...>> {
  using type = std::tuple<std::tuple_element_t<first + I, All>...>;
};

template <auto function, size_t before, class = decltype(function)>
struct Flat;
template <auto function, size_t before, class R, class Problem, class... Others>
struct Flat<function, before, R (*)(const Problem&, Others...)>
    : FlatCall<function, R, Problem, typename Slice<std::tuple<Others...>, 0, std::make_index_sequence<before>>::type,
               typename Problem::Fields,
               typename Slice<std::tuple<Others...>, before, std::make_index_sequence<sizeof...(Others) - before>>::type> {};

}  // namespace grit

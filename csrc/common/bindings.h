// What both extension modules register. Python checks tensors and passes addresses, sizes and strides; there are no
// torch headers here, so one build serves every torch version.
//
// All functions take keyword arguments only. Some take groups of arguments as dictionaries: `draws`, `place`,
// `gradient`.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <initializer_list>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#include "common/problem.h"
#include "common/similarity.h"

namespace emu {

namespace py = pybind11;

// A Problem that keeps alive the Python objects that its addresses belong to.
struct KeptProblem : Problem {
  py::object keep;
};

// --- arguments ------------------------------------------------------------------------------------------------

template <class T>
T named(const std::string& name, std::initializer_list<std::pair<const char*, T>> known) {
  for (const auto& [known_name, value] : known) {
    if (name == known_name) return value;
  }
  throw std::invalid_argument("unknown name " + name);
}
inline void read_name(const std::string& name, DType& to) {
  to = named<DType>(name, {{"float32", DType::kFloat},
                           {"bfloat16", DType::kBFloat16},
                           {"float16", DType::kHalf},
                           {"float64", DType::kDouble}});
}
inline void read_name(const std::string& name, Optimizer& to) {
  to = named<Optimizer>(name, {{"none", Optimizer::kNone},
                               {"sgd", Optimizer::kSgd},
                               {"adagrad", Optimizer::kAdagrad},
                               {"rowwise_adagrad", Optimizer::kRowwiseAdagrad}});
}
inline void read_name(const std::string& name, Reduction& to) {
  to = named<Reduction>(name, {{"none", Reduction::kNone}, {"sum", Reduction::kSum}, {"mean", Reduction::kMean}});
}

// Keyword arguments, each read once by its name.
class Arguments {
 public:
  explicit Arguments(py::dict given) : given_(std::move(given)) {}
  ~Arguments() = default;
  Arguments(const Arguments&) = delete;
  Arguments& operator=(const Arguments&) = delete;

  // Converts to what it is assigned to: an address to a pointer, a name to an enumerator.
  struct Value {
    py::handle object;
    template <class T>
    operator T() const {
      if constexpr (std::is_pointer_v<T>) {
        return reinterpret_cast<T>(object.cast<uintptr_t>());
      } else if constexpr (std::is_enum_v<T>) {
        T value;
        read_name(object.cast<std::string>(), value);
        return value;
      } else {
        return object.cast<T>();
      }
    }
  };
  Value operator[](const char* name) {
    PyObject* const found = PyDict_GetItemString(given_.ptr(), name);
    if (found == nullptr) throw py::type_error(std::string("missing argument ") + name);
    ++read_;
    return {found};
  }
  template <class T>
  T get(const char* name) {
    return (*this)[name].object.cast<T>();
  }
  // Throws if some were not read.
  void end() const {
    if (read_ != given_.size()) throw py::type_error("unexpected argument among " + std::string(py::str(given_)));
  }

 private:
  py::dict given_;
  size_t read_ = 0;
};

// Registers a function. read(arguments) returns the function to call, which runs without the interpreter's lock.
template <class Read>
void define(py::module_& m, const char* name, Read read) {
  m.def(name, [read](const py::kwargs& given) {
    Arguments arguments(given);
    const auto run = read(arguments);
    arguments.end();
    const py::gil_scoped_release release;
    return run();
  });
}

// The same for a function of a problem and the result of read(arguments).
template <class Backend, class Read, class Run>
void define_call(py::module_& m, const char* name, Read read, Run run) {
  define(m, name, [=](Arguments& a) {
    const Problem& p = a.get<const KeptProblem&>("problem");
    return [=, &p, args = read(a)] {
      const typename Backend::Guard guard(p.place);
      return run(p, args);
    };
  });
}

// The index in a list of the entry with a name.
template <class... Entries>
int place_of(List<Entries...>, const std::string& name) {
  const char* const names[] = {Entries::name...};
  for (int i = 0; i < static_cast<int>(sizeof...(Entries)); ++i) {
    if (name == names[i]) return i;
  }
  throw std::invalid_argument("unknown name " + name);
}

// --- the arguments of calls -----------------------------------------------------------------------------------

struct Nothing {};
inline Nothing read_nothing(Arguments&) { return {}; }

inline Draws read_draws(py::dict given) {
  Arguments a(std::move(given));
  Draws draws{};
  draws.rule = place_of(Mutations{}, a["mutation"]);
  draws.seed = a["seed"];
  draws.row_offset = static_cast<uint32_t>(a.get<int64_t>("row_offset"));
  with_entry(Mutations{}, draws.rule, [&](auto rule) {
    draws.kind = rule.kDraw;
    draws.pairs = rule.kPairs;
    rule.read_parameters(draws, [&](const char* name, auto& to) { to = a[name]; });
  });
  a.end();
  return draws;
}

// The CPU backend gives threads, the CUDA backend the rest.
inline Place read_place(py::dict given) {
  Arguments a(given);
  Place place{};
  if (given.contains("threads")) place.threads = a["threads"];
  if (given.contains("device")) {
    place.device = a["device"];
    place.processors = a["processors"];
    place.stream = a["stream"];
  }
  a.end();
  return place;
}

inline GradientArgs read_gradient(py::dict given) {
  Arguments a(std::move(given));
  GradientArgs g{};
  g.weight = a["weight"];
  g.mutated_weight = a["mutated_weight"];
  g.variance_weight = a["variance_weight"];
  g.grad_rate = a["grad_rate"];
  g.grad_query = a["grad_query"];
  g.grad_positive = a["grad_positive"];
  g.grad_scale = a["grad_scale"];
  g.grad_weights = a["grad_weights"];
  a.end();
  return g;
}

inline KeptProblem read_problem(const py::kwargs& given) {
  Arguments a(given);
  KeptProblem p{};
  p.keep = a.get<py::object>("keep");
  p.query = a["query"];
  p.table = a["table"];
  p.scale = a["scale"];
  p.weights = a["weights"];
  p.positive = a["positive"];
  p.negative = a["negative"];
  p.report = a["report"];
  p.dtype = a["dtype"];
  p.table_stride = a["table_stride"];
  p.N = a["table_rows"];
  p.B = a["batch"];
  p.D = a["dim"];
  p.G = a["groups"];
  p.K = a["count"];
  p.similarity = place_of(Similarities{}, a["similarity"]);
  p.phase_scale = a["phase_scale"];
  p.draws = read_draws(a.get<py::dict>("draws"));
  p.place = read_place(a.get<py::dict>("place"));
  a.end();
  return p;
}

inline LossArgs read_loss(Arguments& a) {
  LossArgs args{};
  args.beta = a["beta"];
  args.alpha = a["alpha"];
  args.coefficients = a["coefficients"];
  args.sample_weight = a["sample_weight"];
  args.positive_log_q = a["positive_log_q"];
  args.negative_log_q = a["negative_log_q"];
  args.reduction = a["reduction"];
  args.need_grad = a["need_grad"];
  args.loss = a["loss"];
  args.terms = a["terms"];
  args.row_scale = a["row_scale"];
  args.gradient = read_gradient(a.get<py::dict>("gradient"));
  args.workspace = a["workspace"];
  return args;
}

inline ScoreArgs read_scores(Arguments& a) {
  ScoreArgs args{};
  args.positive = a["positive"];
  args.negative = a["negative"];
  args.mutated = a["mutated"];
  args.cumulant = a["cumulant"];
  return args;
}

inline QueryGradientArgs read_query_gradient(Arguments& a) {
  QueryGradientArgs args{};
  args.positive_weight = a["positive_weight"];
  args.weight = a["weight"];
  args.mutated_weight = a["mutated_weight"];
  args.cumulant_weight = a["cumulant_weight"];
  args.gradient = read_gradient(a.get<py::dict>("gradient"));
  args.workspace = a["workspace"];
  return args;
}

inline TableGradientArgs read_table_gradient(Arguments& a) {
  TableGradientArgs args{};
  args.row_scale = a["row_scale"];
  args.weight = a["weight"];
  args.mutated_weight = a["mutated_weight"];
  args.variance_weight = a["variance_weight"];
  args.grad_positive = a["grad_positive"];
  args.out = a["out"];
  return args;
}

inline MutateArgs read_mutate(Arguments& a) {
  MutateArgs args{};
  args.dtype = a["dtype"];
  args.B = a["batch"];
  args.K = a["count"];
  args.D = a["dim"];
  args.draws = read_draws(a.get<py::dict>("draws"));
  args.place = read_place(a.get<py::dict>("place"));
  return args;
}

// --- descriptions of the lists' entries, for tests that compare Python's with them -------------------------------

template <class Sim>
py::dict describe_similarity() {
  constexpr const char* kFactors[] = {"none", "scale", "phase"};
  py::tuple factors(Sim::kHalves), roots(Sums<Sim>::kCount);
  for (int h = 0; h < Sim::kHalves; ++h) factors[h] = kFactors[static_cast<int>(Sim::factor(h))];
  for (int s = 0; s < Sums<Sim>::kCount; ++s) roots[s] = Sim::root(s);
  using namespace py::literals;
  return py::dict("name"_a = Sim::name, "halves"_a = Sim::kHalves, "coupled"_a = Sim::kCoupled,
                  "bilinear"_a = Sim::kBilinear, "weights"_a = Sim::kWeights, "factors"_a = factors, "roots"_a = roots);
}

template <class Rule>
py::dict describe_mutation() {
  constexpr const char* kDraws[] = {"none", "mask", "share", "moments"};
  using namespace py::literals;
  return py::dict("name"_a = Rule::name, "draw"_a = kDraws[static_cast<int>(Rule::kDraw)], "pairs"_a = Rule::kPairs);
}

template <class... Sims>
py::list describe_similarities(List<Sims...>) {
  py::list all;
  (all.append(describe_similarity<Sims>()), ...);
  return all;
}
template <class... Rules>
py::list describe_mutations(List<Rules...>) {
  py::list all;
  (all.append(describe_mutation<Rules>()), ...);
  return all;
}

// --- the functions that both modules have -----------------------------------------------------------------------

// Backend has these as static functions, and a type Guard, which is made from the call's Place before the function
// runs.
template <class Backend>
void define_operators(py::module_& m) {
  m.def("similarities", [] { return describe_similarities(Similarities{}); });
  m.def("mutations", [] { return describe_mutations(Mutations{}); });

  // Local, so that the tests' build of the same sources can be loaded beside this one.
  py::class_<KeptProblem>(m, "Problem", py::module_local()).def(py::init(&read_problem));

  define_call<Backend>(
      m, "loss_workspace", [](Arguments& a) -> bool { return a["need_grad"]; }, &Backend::loss_workspace);
  define_call<Backend>(m, "query_gradient_workspace", read_nothing, &Backend::query_gradient_workspace);
  define_call<Backend>(m, "loss_forward", read_loss, &Backend::loss_forward);
  define_call<Backend>(m, "scores_forward", read_scores, &Backend::scores_forward);
  define_call<Backend>(m, "query_gradient", read_query_gradient, &Backend::query_gradient);
  define(m, "mutate_forward", [](Arguments& a) {
    MutateArgs args = read_mutate(a);
    args.positive = a["positive"];
    args.negative = a["negative"];
    args.out = a["out"];
    return [=] {
      const typename Backend::Guard guard(args.place);
      Backend::mutate_forward(args);
    };
  });
  define(m, "mutate_backward", [](Arguments& a) {
    MutateArgs args = read_mutate(a);
    args.negative = a["grad"];
    args.grad_positive = a["grad_positive"];
    args.grad_negative = a["grad_negative"];
    return [=] {
      const typename Backend::Guard guard(args.place);
      Backend::mutate_backward(args);
    };
  });
}

}  // namespace emu

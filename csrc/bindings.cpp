// The extension module emu_kernels._C.
#include "common/bindings.h"

#include <array>
#include <memory>
#include <vector>

#include "common/philox.h"
#include "cpu/huge_pages.h"
#include "cpu/kernels.h"
#include "cpu/segments.h"
#include "cpu/threads.h"

using namespace emu;

namespace {

struct Cpu {
  struct Guard {
    explicit Guard(const Place&) {}
  };
  static int64_t loss_workspace(const Problem&, bool) { return 0; }
  static int64_t query_gradient_workspace(const Problem&, Nothing) { return 0; }
  static void loss_forward(const Problem& p, const LossArgs& a) { kernels().loss_forward(p, a); }
  static void scores_forward(const Problem& p, const ScoreArgs& a) { kernels().scores_forward(p, a); }
  static void query_gradient(const Problem& p, const QueryGradientArgs& a) { kernels().query_gradient(p, a); }
  static void mutate_forward(const MutateArgs& a) { kernels().mutate_forward(a); }
  static void mutate_backward(const MutateArgs& a) { kernels().mutate_backward(a); }
};

std::vector<std::string> instruction_sets() {
  const Kernels* runnable[3];
  const int count = runnable_kernels(runnable);
  std::vector<std::string> names;
  for (int i = 0; i < count; ++i) names.emplace_back(runnable[i]->name);
  return names;
}

RelationalArgs read_relational(Arguments& a) {
  RelationalArgs args{};
  const std::string task = a["task"], message = a["message"], aggregate = a["aggregate"];
  args.task = named<RelationalTask>(
      task,
      {{"forward", RelationalTask::kForward}, {"backward", RelationalTask::kBackward}, {"own", RelationalTask::kOwn}});
  args.message = named<Message>(
      message, {{"distmult", Message::kDistMult}, {"transe", Message::kTransE}, {"rotate", Message::kRotate}});
  args.aggregate = named<Aggregate>(aggregate, {{"sum", Aggregate::kSum},
                                                {"mean", Aggregate::kSum},
                                                {"min", Aggregate::kMin},
                                                {"max", Aggregate::kMax},
                                                {"pna", Aggregate::kPna}});
  args.dtype = a["dtype"];
  args.N = a["node_count"];
  args.R = a["relation_count"];
  args.B = a["batch"];
  args.D = a["dim"];
  args.size = a["size"];
  args.relation_rows = a["relation_rows"];
  args.nodes = a["nodes"];
  args.relations = a["relations"];
  args.own = a["own"];
  args.weight = a["weight"];
  args.keep = a["keep"];
  args.start = a["start"];
  args.other = a["other"];
  args.relation = a["relation"];
  args.edge = a["edge"];
  args.share = a["share"];
  args.grad = a["grad"];
  args.result = a["result"];
  args.out = a["out"];
  args.relation_gradient = a["relation_gradient"];
  args.epsilon = a["epsilon"];
  args.threads = a["threads"];
  return args;
}

StepArgs read_step(py::dict given) {
  Arguments a(std::move(given));
  StepArgs step{};
  step.optimizer = a["optimizer"];
  step.lr = a["lr"];
  step.eps = a["eps"];
  step.table = a["table"];
  step.sums = a["sums"];
  step.count = a["count"];
  step.ids = a["ids"];
  step.order = a["order"];
  step.rows = a["rows"];
  a.end();
  return step;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels of emu_kernels (private)";
  m.attr("version") = EMU_VERSION;
  define_operators<Cpu>(m);

  py::class_<Segments>(m, "Segments").def("touched", &Segments::touched);
  define_call<Cpu>(m, "sort_ids", read_nothing,
                   [](const Problem& p, Nothing) { return std::make_unique<Segments>(p); });
  define_call<Cpu>(
      m, "table_gradient",
      [](Arguments& a) {
        TableGradientArgs args = read_table_gradient(a);
        const Segments& segments = a.get<const Segments&>("segments");
        args.ids = a["ids"];
        args.sorted = segments.sorted();
        args.sorted_size = segments.size();
        if (const auto step = a.get<py::dict>("step"); !step.empty()) args.step = read_step(step);
        return args;
      },
      [](const Problem& p, const TableGradientArgs& a) { kernels().table_gradient(p, a); });

  define(m, "relational", [](Arguments& a) {
    const RelationalArgs args = read_relational(a);
    return [=] { kernels().relational(args); };
  });
  define(m, "prefer_huge_pages", [](Arguments& a) {
    void* const memory = a["memory"];
    const size_t bytes = a["bytes"];
    return [=] { prefer_huge_pages(memory, bytes); };
  });
  define(m, "philox", [](Arguments& a) {
    const auto counter = a.get<std::array<uint32_t, 4>>("counter");
    const uint64_t seed = a["seed"];
    return [=] {
      std::array<uint32_t, 4> out;
      philox4x32(counter.data(), seed, out.data());
      return out;
    };
  });
  m.def("joins_torch", &joins_torch);
  m.def("instruction_sets", &instruction_sets);
  m.def("instruction_set", [] { return std::string(kernels().name); });
  m.def("compiler", [] {
#if defined(__clang__)
    return "Clang " __clang_version__;
#else
    return "GCC " __VERSION__;
#endif
  });
}

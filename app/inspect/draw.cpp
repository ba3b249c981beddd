#include <algorithm>
#include <array>
#include <cstdarg>
#include <cstdio>
#include <vector>

#include "app/inspect/report.h"

namespace twell::app {
namespace {

using Json = nlohmann::ordered_json;

constexpr std::array kRateLabels = {"silent", "< 0.01%", "< 0.1%", "< 1%",
                                    "< 10%",  "< 50%",   "50% up"};

[[gnu::format(printf, 1, 2)]] std::string format(const char* pattern, ...) {
  char text[512];
  std::va_list arguments;
  va_start(arguments, pattern);
  std::vsnprintf(text, sizeof text, pattern, arguments);
  va_end(arguments);
  return text;
}

// `share` of `cells` character cells, in eighths of a cell.
std::string bar(double share, int cells) {
  static constexpr std::array kEighths = {"", "▏", "▎", "▍", "▌", "▋", "▊", "▉"};
  const int eighths = static_cast<int>(std::clamp(share, 0.0, 1.0) * cells * 8 + 0.5);
  std::string text;
  for (int i = 0; i < eighths / 8; ++i) text += "█";
  text += kEighths[eighths % 8];
  const int used = eighths / 8 + (eighths % 8 != 0);
  for (int i = used; i < cells; ++i) text += ' ';
  return text;
}

double largest_mean(const Json& report) {
  double largest = 1e-9;
  for (const Json& layer : report["layers"]) {
    largest = std::max(largest, double{layer["active_mean"]});
  }
  return largest;
}

double share_of(const Json& histogram, std::size_t bucket) {
  double total = 0;
  for (const Json& count : histogram) total += double{count};
  return total > 0 ? double{histogram[bucket]} / total : 0;
}

double share_active(const Json& layer) {
  return double{layer["active_mean"]} / double{layer["neurons"]};
}

std::string headline(const Json& report) {
  std::vector<long long> neurons;
  for (const Json& layer : report["layers"]) neurons.push_back(layer["neurons"].get<long long>());
  const auto [least, most] = std::minmax_element(neurons.begin(), neurons.end());
  return format(
      "%s: layers: %zu, neurons of each: %s, tokens: %lld",
      report["source"].get<std::string>().c_str(), neurons.size(),
      (*least == *most ? format("%lld", *most) : format("%lld to %lld", *least, *most)).c_str(),
      report["tokens"].get<long long>());
}

std::string escape(const std::string& text) {
  std::string escaped;
  for (const char c : text) {
    switch (c) {
      case '<':
        escaped += "&lt;";
        break;
      case '&':
        escaped += "&amp;";
        break;
      default:
        escaped += c;
    }
  }
  return escaped;
}

constexpr const char* kStyle = R"(
:root{--ink:#1c2024;--soft:#6b7280;--line:#e3e5e8;--paper:#fff;--card:#f7f8fa;--fill:#0b7285;
--c0:#adb5bd;--c1:#d0ebff;--c2:#91c9f2;--c3:#4ba3de;--c4:#1971c2;--c5:#e8890c;--c6:#c92a2a}
@media(prefers-color-scheme:dark){:root{--ink:#e6e8eb;--soft:#9aa2ad;--line:#30363d;
--paper:#14171b;--card:#1c2127;--fill:#3bc9db;--c0:#495057;--c1:#1b3a57;--c2:#1f5f95;--c3:#2f86cf;
--c4:#74c0fc;--c5:#ffa94d;--c6:#ff6b6b}}
body{margin:0 auto;max-width:64rem;padding:2rem 1.2rem;background:var(--paper);color:var(--ink);
font:16px/1.5 system-ui,sans-serif}
h1{font-size:1.6rem;margin:0}h2{font-size:1.1rem;margin:2.2rem 0 .6rem}p{color:var(--soft);margin:.3rem 0}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th{font-weight:500;color:var(--soft);font-size:.85rem}
th,td{text-align:right;padding:.35rem .6rem;border-bottom:1px solid var(--line);white-space:nowrap}
td.wide{width:34%}.track{display:flex;height:.9rem;background:var(--card);border-radius:3px;overflow:hidden}
.track i{display:block;height:100%}.key i{display:inline-block;width:.8rem;height:.8rem;border-radius:2px;
margin:0 .35rem 0 .9rem;vertical-align:-1px}
)";

}  // namespace

std::string draw_text(const Json& report) {
  const double largest = largest_mean(report);
  std::string out = headline(report) + "\n\n";
  out +=
      "layer neurons active per token          mean   share    p99    max  silent   union of 64    "
      "128    ";
  out += "256 tokens   predicted prefill   decode\n";
  for (const Json& layer : report["layers"]) {
    out += format(
        "%5d %7lld %s %8.1f %6.2f%% %6lld %6lld %7lld   %11.0f %6.0f    %10.0f   %16.2f× %7.2f×\n",
        int{layer["layer"]}, layer["neurons"].get<long long>(),
        bar(double{layer["active_mean"]} / largest, 20).c_str(), double{layer["active_mean"]},
        100 * share_active(layer), layer["active_p99"].get<long long>(),
        layer["active_max"].get<long long>(), layer["silent"].get<long long>(),
        double{layer["union_mean"]["64"]}, double{layer["union_mean"]["128"]},
        double{layer["union_mean"]["256"]}, double{layer["predicted"]["prefill_512"]},
        double{layer["predicted"]["decode_1"]});
  }
  out += "\nlayer  share of 256-neuron tile rows that overflow, by slots\n     ";
  for (const auto& [slots, share] : report["layers"][0]["overflow_share"].items()) {
    out += format(" %8s", slots.c_str());
  }
  out += '\n';
  for (const Json& layer : report["layers"]) {
    out += format("%5d", int{layer["layer"]});
    for (const auto& [slots, share] : layer["overflow_share"].items()) {
      out += format(" %7.3f%%", 100 * double{share});
    }
    out += '\n';
  }
  out += "\nlayer  neurons by firing rate\n     ";
  for (const char* label : kRateLabels) out += format(" %9s", label);
  out += '\n';
  for (const Json& layer : report["layers"]) {
    out += format("%5d", int{layer["layer"]});
    for (std::size_t i = 0; i < kRateLabels.size(); ++i) {
      out += format(" %8.1f%%", 100 * share_of(layer["rate_histogram"], i));
    }
    out += '\n';
  }
  return out;
}

std::string draw_html(const Json& report) {
  const double largest = largest_mean(report);
  std::string out =
      "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\">"
      "<meta name=\"viewport\" content=\"width=device-width\"><title>twell inspect</title><style>";
  out += kStyle;
  out += "</style><h1>Where it is sparse</h1><p>";
  out += escape(headline(report));
  out += "</p>";
  out +=
      "<h2>Active neurons per token</h2><div "
      "class=scroll><table><tr><th>layer<th>neurons<th><th>mean<th>share<th>p99<th>max"
      "<th>silent<th>union of 64<th>128<th>256 tokens<th>prefill<th>decode</tr>";
  for (const Json& layer : report["layers"]) {
    const double mean = layer["active_mean"];
    out += format(
        "<tr><td>%d<td>%lld<td class=wide><div class=track><i "
        "style=\"width:%.1f%%;background:var(--fill)\">"
        "</i></div><td>%.1f<td>%.2f%%<td>%lld<td>%lld<td>%lld<td>%.0f<td>%.0f<td>%.0f"
        "<td>%.2f×<td>%.2f×</tr>",
        int{layer["layer"]}, layer["neurons"].get<long long>(), 100 * mean / largest, mean,
        100 * share_active(layer), layer["active_p99"].get<long long>(),
        layer["active_max"].get<long long>(), layer["silent"].get<long long>(),
        double{layer["union_mean"]["64"]}, double{layer["union_mean"]["128"]},
        double{layer["union_mean"]["256"]}, double{layer["predicted"]["prefill_512"]},
        double{layer["predicted"]["decode_1"]});
  }
  out +=
      "</table></div><p>Prefill (512 tokens) and decode (1 token): the planner's prediction of "
      "dense over "
      "sparse time.</p><h2>Neurons by firing rate</h2><p class=key>";
  for (std::size_t i = 0; i < kRateLabels.size(); ++i) {
    out += format("<i style=\"background:var(--c%zu)\"></i>%s", i, escape(kRateLabels[i]).c_str());
  }
  out += "</p><table>";
  for (const Json& layer : report["layers"]) {
    out += format("<tr><td>%d<td style=\"width:95%%\"><div class=track>", int{layer["layer"]});
    for (std::size_t i = 0; i < kRateLabels.size(); ++i) {
      out += format("<i style=\"width:%.2f%%;background:var(--c%zu)\"></i>",
                    100 * share_of(layer["rate_histogram"], i), i);
    }
    out += "</div></tr>";
  }
  out +=
      "</table><h2>Tile rows that overflow, by "
      "slots</h2><table><tr><th>layer<th>8<th>16<th>32<th>64<th>128</tr>";
  for (const Json& layer : report["layers"]) {
    out += format("<tr><td>%d", int{layer["layer"]});
    for (const auto& [slots, share] : layer["overflow_share"].items()) {
      out += format("<td>%.3f%%", 100 * double{share});
    }
    out += "</tr>";
  }
  return out + "</table></html>\n";
}

}  // namespace twell::app

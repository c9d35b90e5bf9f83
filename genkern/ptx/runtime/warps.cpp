// The meeting of lanes, and what they compute without tensor cores.
#include "warps.h"

#include "conversions.h"
#include "integers.h"

namespace ptx {

namespace {

struct Group {
  u32 mask, arrived;
  Request* lanes[32];
};
struct Warp {
  std::vector<Group> groups;
};
std::vector<Warp> warps;

Group& group_of(Warp& warp, u32 mask) {
  for (Group& group : warp.groups)
    if (group.mask == mask) return group;
  warp.groups.push_back({mask, 0, {}});
  return warp.groups.back();
}

u32 lanes_of(const Fiber& t) {
  const u32 lanes = machine.threads - 32 * t.warp;
  return lanes >= 32 ? ~0u : (1u << lanes) - 1;
}

void check_agreement(Fiber& t, const Request& mine, const Group& group) {
  for (u32 lane = 0; lane < 32; ++lane) {
    const Request* other = group.lanes[lane];
    if (!(group.arrived >> lane & 1) || other == &mine) continue;
    if (other->kind != mine.kind || (mine.aligned && other->line != mine.line))
      fail(t, mine.line, Fault::absent_lane, "meets lane %u at another instruction, in PTX line %u",
           lane, other->line);
    return;
  }
}

}  // namespace

void meet(Fiber& t, Request& mine, void (*compute)(Request**, u32, Fiber&)) {
  if (!(mine.mask >> t.lane & 1))
    fail(t, mine.line, Fault::absent_lane,
         "executes it with the mask %#x, which does not name lane %u", mine.mask, t.lane);
  if (mine.mask & ~lanes_of(t))
    fail(t, mine.line, Fault::absent_lane, "the mask %#x names lanes that the warp does not have",
         mine.mask);
  if (warps.size() <= t.warp) warps.resize(t.warp + 1);
  Group& group = group_of(warps[t.warp], mine.mask);
  group.lanes[t.lane] = &mine;
  group.arrived |= 1u << t.lane;
  check_agreement(t, mine, group);
  if (group.arrived != group.mask) {
    t.state = State::in_warp;
    t.waits_in_line = mine.line, t.waits_for_mask = mine.mask;
    suspend(t);
    return;
  }
  compute(group.lanes, group.mask, t);
  group.arrived = 0;
  machine.turns = 0;
  for (u32 lane = 0; lane < 32; ++lane)
    if (mine.mask >> lane & 1 && lane != t.lane) make_ready(machine.fibers[32 * t.warp + lane]);
}

void reset_warps() {
  for (Warp& warp : warps) warp.groups.clear();
}

void report_lanes(Fiber& waiting) {
  for (u32 lane = 0; lane < 32; ++lane) {
    if (!(waiting.waits_for_mask >> lane & 1)) continue;
    const Fiber& other = machine.fibers[32 * waiting.warp + lane];
    if (other.state == State::in_warp && other.waits_for_mask == waiting.waits_for_mask) continue;
    if (other.state == State::done)
      fail(waiting, waiting.waits_in_line, Fault::absent_lane,
           "the mask %#x names lane %u, which has exited", waiting.waits_for_mask, lane);
    fail(waiting, waiting.waits_in_line, Fault::absent_lane,
         "the mask %#x names lane %u, which waits in PTX line %u", waiting.waits_for_mask, lane,
         other.waits_in_line);
  }
  fail(waiting, waiting.waits_in_line, Fault::deadlock, "waits for its warp for ever");
}

void warp_barrier(Thread& thread, u32 mask, u32 line) {
  Request request{kind_of(kind_barrier, 0), mask, line, false};
  meet(fiber(thread), request, [](Request**, u32 lanes, Fiber& last) {
    Fiber* const first = &machine.fibers[32 * last.warp];
    static std::vector<u16> joined;
    joined.assign(machine.threads, 0);
    for (u32 lane = 0; lane < 32; ++lane) {
      if (!(lanes >> lane & 1)) continue;
      const u16* known = knowledge(first[lane]);
      for (u32 i = 0; i < machine.threads; ++i) joined[i] = std::max(joined[i], known[i]);
    }
    for (u32 lane = 0; lane < 32; ++lane)
      if (lanes >> lane & 1) joined[32 * last.warp + lane] = u16(first[lane].tick + 1);
    for (u32 lane = 0; lane < 32; ++lane) {
      if (!(lanes >> lane & 1)) continue;
      std::copy(joined.begin(), joined.end(), first[lane].known);
      ++first[lane].tick;
    }
  });
}

namespace {
struct ShuffleRequest : Request {
  Shuffle mode;
  u32 value, lane, clamp, result;
  bool in_range;
};
struct VoteRequest : Request {
  bool value;
  u32 result;
};
struct MatchRequest : Request {
  u64 value;
  u32 result;
};
struct ReduceRequest : Request {
  Reduce op;
  u32 value, result;
};
struct FloatReduceRequest : Request {
  bool greatest, absolute_values, nan;
  u32 value, result;
};

template <class R>
R& as(Request** lanes, u32 lane) {
  return *static_cast<R*>(lanes[lane]);
}
template <class F>
void each_lane(u32 mask, F f) {
  for (u32 lane = 0; lane < 32; ++lane)
    if (mask >> lane & 1) f(lane);
}

// The source lane as PTX defines it: a segment of the warp, and whether the lane lies in it.
u32 source_lane(Shuffle mode, u32 lane, u32 operand, u32 c, bool* in_range) {
  const u32 b = operand & 31, clamp = c & 31, segment = c >> 8 & 31;
  const u32 most = (lane & segment) | (clamp & ~segment), least = lane & segment;
  s32 source = 0;
  switch (mode) {
    case up:
      source = s32(lane) - s32(b), *in_range = source >= s32(most);
      break;
    case down:
      source = s32(lane + b), *in_range = source <= s32(most);
      break;
    case bfly:
      source = s32(lane ^ b), *in_range = source <= s32(most);
      break;
    case idx:
      source = s32(least | (b & ~segment)), *in_range = source <= s32(most);
      break;
  }
  return *in_range ? u32(source) : lane;
}
}  // namespace

u32 shuffle(Thread& t, Shuffle mode, u32 value, u32 lane, u32 clamp, u32 mask, bool* in_range,
            u32 line) {
  ShuffleRequest request{
      {kind_of(kind_shuffle, mode), mask, line, false}, mode, value, lane, clamp, 0, false};
  meet(fiber(t), request, [](Request** lanes, u32 mask, Fiber& last) {
    each_lane(mask, [&](u32 lane) {
      auto& r = as<ShuffleRequest>(lanes, lane);
      const u32 source = source_lane(r.mode, lane, r.lane, r.clamp, &r.in_range);
      if (!(mask >> source & 1))
        fail(last, r.line, Fault::absent_lane,
             "lane %u reads from lane %u, which the mask %#x does not name", lane, source, mask);
      r.result = as<ShuffleRequest>(lanes, source).value;
    });
  });
  if (in_range) *in_range = request.in_range;
  return request.result;
}

u32 vote_ballot(Thread& t, bool value, u32 mask, u32 line) {
  VoteRequest request{{kind_of(kind_vote, 0), mask, line, false}, value, 0};
  meet(fiber(t), request, [](Request** lanes, u32 mask, Fiber&) {
    u32 ballot = 0;
    each_lane(mask, [&](u32 lane) { ballot |= u32(as<VoteRequest>(lanes, lane).value) << lane; });
    each_lane(mask, [&](u32 lane) { as<VoteRequest>(lanes, lane).result = ballot; });
  });
  return request.result;
}

namespace {
void match_lanes(Request** lanes, u32 mask, Fiber&) {
  each_lane(mask, [&](u32 lane) {
    auto& r = as<MatchRequest>(lanes, lane);
    each_lane(mask, [&](u32 other) {
      r.result |= u32(as<MatchRequest>(lanes, other).value == r.value) << other;
    });
  });
}
}  // namespace

u32 match_any(Thread& t, u64 value, u32 mask, u32 line) {
  MatchRequest request{{kind_of(kind_match, 0), mask, line, false}, value, 0};
  meet(fiber(t), request, match_lanes);
  return request.result;
}

u32 match_all(Thread& t, u64 value, u32 mask, bool* equal, u32 line) {
  MatchRequest request{{kind_of(kind_match, 1), mask, line, false}, value, 0};
  meet(fiber(t), request, match_lanes);
  const bool all = request.result == mask;
  if (equal) *equal = all;
  return all ? mask : 0;
}

u32 reduce(Thread& t, Reduce op, u32 value, u32 mask, u32 line) {
  ReduceRequest request{{kind_of(kind_reduce, op), mask, line, false}, op, value, 0};
  meet(fiber(t), request, [](Request** lanes, u32 mask, Fiber&) {
    bool first = true;
    u32 total = 0;
    each_lane(mask, [&](u32 lane) {
      const auto& r = as<ReduceRequest>(lanes, lane);
      const u32 x = r.value;
      if (first) {
        total = x, first = false;
        return;
      }
      switch (r.op) {
        case sum_u32:
          total += x;
          break;
        case min_u32:
          total = least(total, x);
          break;
        case max_u32:
          total = greatest(total, x);
          break;
        case min_s32:
          total = u32(least(s32(total), s32(x)));
          break;
        case max_s32:
          total = u32(greatest(s32(total), s32(x)));
          break;
        case and_b32:
          total &= x;
          break;
        case or_b32:
          total |= x;
          break;
        case xor_b32:
          total ^= x;
          break;
      }
    });
    each_lane(mask, [&](u32 lane) { as<ReduceRequest>(lanes, lane).result = total; });
  });
  return request.result;
}

u32 reduce_f32(Thread& t, u32 value, bool greatest, bool absolute_values, bool nan, u32 mask,
               u32 line) {
  FloatReduceRequest request{
      {kind_of(kind_reduce, 64 + greatest + 2 * absolute_values + 4 * nan), mask, line, false},
      greatest,
      absolute_values,
      nan,
      value,
      0};
  meet(fiber(t), request, [](Request** lanes, u32 mask, Fiber&) {
    bool first = true;
    f32 total = 0;
    each_lane(mask, [&](u32 lane) {
      const auto& r = as<FloatReduceRequest>(lanes, lane);
      f32 x = bit_cast<f32>(r.value);
      if (r.absolute_values) x = absolute(x);
      if (first)
        total = x, first = false;
      else if (r.greatest)
        total = r.nan ? maximum<none, NaN, none>(total, x) : maximum<none, none, none>(total, x);
      else
        total = r.nan ? minimum<none, NaN, none>(total, x) : minimum<none, none, none>(total, x);
    });
    each_lane(mask,
              [&](u32 lane) { as<FloatReduceRequest>(lanes, lane).result = bit_cast<u32>(total); });
  });
  return request.result;
}

u32 elect(Thread& t, u32 mask, bool* elected, u32 line) {
  VoteRequest request{{kind_of(kind_elect, 0), mask, line, false}, false, 0};
  meet(fiber(t), request, [](Request** lanes, u32 mask, Fiber&) {
    const u32 leader = u32(__builtin_ctz(mask));
    each_lane(mask, [&](u32 lane) { as<VoteRequest>(lanes, lane).result = leader; });
  });
  *elected = request.result == t.lane;
  return request.result;
}

}  // namespace ptx

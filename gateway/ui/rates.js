// What a deployment does, from two readings of its counters. Protobuf's JSON leaves out zeros and writes long integers as text.

const num = (status, field) => Number(status?.[field] ?? 0);

/** One replica between two readings; null: there was nothing to measure. */
function viewOf(before, after, elapsedS) {
  const old = before?.status;
  const now = after.status;
  if (!now) return { replica: after.replica ?? 0, ready: false, reason: after.error ?? "unknown", running: 0, waiting: 0 };
  const sameLife = old && num(now, "target_rounds_total") >= num(old, "target_rounds_total");
  const grown = (field) => (sameLife && elapsedS > 0 ? (num(now, field) - num(old, field)) / elapsedS : null);
  const share = (field) => (sameLife && elapsedS > 0 ? Math.min(1, grown(field)) : null);
  const hasDrafted = num(now.speculation_total, "num_drafts") > 0;
  const blocks = num(now, "num_blocks");
  return {
    replica: after.replica ?? 0,
    ready: now.ready ?? false,
    reason: now.not_ready_reason ?? "",
    running: num(now, "num_requests_running"),
    waiting: num(now, "num_requests_waiting"),
    tokensPerS: grown("generation_tokens_total"),
    acceptance: hasDrafted ? num(now, "acceptance_rate") : null,
    k: hasDrafted ? num(now, "drafts_per_verification") : null,
    draftIdle: hasDrafted ? share("draft_idle_seconds_total") : null,
    verifyWait: hasDrafted ? share("verify_wait_seconds_total") : null,
    kv: blocks ? 1 - num(now, "num_free_blocks") / blocks : null,
  };
}

export function viewsOf(before, after, elapsedS) {
  const old = new Map((before?.replicas ?? []).map((each) => [each.replica ?? 0, each]));
  return (after.replicas ?? []).map((each) => viewOf(old.get(each.replica ?? 0), each, elapsedS));
}

/** Of all replicas; means are weighted by their tokens. */
export function totalOf(views) {
  const sum = (field) => views.reduce((total, view) => total + (view[field] ?? 0), 0);
  const mean = (field) => {
    const known = views.filter((view) => typeof view[field] === "number");
    const weight = (view) => (view.tokensPerS ?? 0) + 1e-6;
    const total = known.reduce((all, view) => all + weight(view), 0);
    return known.length ? known.reduce((all, view) => all + weight(view) * view[field], 0) / total : null;
  };
  return {
    tokensPerS: views.some((view) => typeof view.tokensPerS === "number") ? sum("tokensPerS") : null,
    running: sum("running"),
    waiting: sum("waiting"),
    acceptance: mean("acceptance"),
    k: mean("k"),
    draftIdle: mean("draftIdle"),
    verifyWait: mean("verifyWait"),
  };
}

/** How often each draft of a verification was accepted, since an earlier reading if there were verifications since. */
export function acceptanceByPosition(status, earlier) {
  const read = (from) => ({
    drafts: num(from?.speculation_total, "num_drafts"),
    accepted: (from?.speculation_total?.accepted_per_position ?? []).map(Number),
  });
  const now = read(status);
  const then = read(earlier);
  const isRecent = now.drafts > then.drafts && then.drafts > 0;
  const drafts = now.drafts - (isRecent ? then.drafts : 0);
  const accepted = now.accepted.map((count, i) => count - (isRecent ? (then.accepted[i] ?? 0) : 0));
  return { isRecent, drafts, shares: drafts > 0 ? accepted.map((count) => count / drafts) : [] };
}

/** Every tier of every engine of a replica: the device first. */
export function tiersOf(before, status, elapsedS) {
  const tiers = [];
  for (const [engine, prefix] of [["target", ""], ["draft", "draft_"]]) {
    const all = num(status, `num_${prefix}blocks`);
    const used = all - num(status, `num_free_${prefix}blocks`);
    if (all) tiers.push({ engine, tier: "device", share: used / all, text: `${used} of ${all} blocks` });
    const role = `ENGINE_ROLE_${engine.toUpperCase()}`;
    for (const tier of (status.tiers ?? []).filter((each) => each.engine === role)) tiers.push(outerTier(engine, tier, before, elapsedS));
  }
  return tiers;
}

function outerTier(engine, tier, before, elapsedS) {
  const size = num(tier, "block_bytes");
  const [used, all] = [num(tier, "num_used_blocks") * size, num(tier, "num_blocks") * size];
  const old = (before?.tiers ?? []).find((each) => each.engine === tier.engine && each.tier === tier.tier);
  const flow = (field) => (old && elapsedS > 0 ? (Math.max(0, num(tier, field) - num(old, field)) * size) / elapsedS : 0);
  return {
    engine,
    tier: tier.tier,
    share: all ? used / all : 0,
    used,
    all,
    storedPerS: flow("stored_blocks_total"),
    fetchedPerS: flow("fetched_blocks_total"),
    trouble: tier.paused ? `left alone after errors: ${tier.last_error ?? ""}` : "",
  };
}

/** Numbers of an answer, for people. */

export function seconds(value) {
  if (value === null || value === undefined) return "–";
  return value < 1 ? `${Math.round(value * 1000)} ms` : `${value.toFixed(value < 10 ? 2 : 1)} s`;
}

export function number(value, digits = 0) {
  return value === null || value === undefined || !Number.isFinite(value) ? "–" : value.toFixed(digits);
}

/**
 * @typedef {{tokensPerSecond: ?number, tokens: ?number, forwards: ?number, tokensPerForward: ?number, edits: ?number,
 *   first: ?number, seconds: ?number, whole: ?boolean, cached: ?number, firstName: string, withEdits: boolean}} Figures
 */

/** Figures of a finished answer. */
export function figuresOf({ usage, timing }) {
  return {
    tokens: usage.completion_tokens, forwards: usage.forward_passes, edits: usage.edited_tokens,
    tokensPerSecond: timing.tokens_per_second, tokensPerForward: timing.tokens_per_forward,
    first: timing.first_block_seconds, seconds: timing.seconds, whole: true,
    cached: usage.cached_tokens, drafted: usage.drafted_tokens, confirmed: usage.confirmed_tokens,
  };
}

/** Draw figures into a definition list; updated in place, so that nothing moves while they grow. */
export function drawFigures(list, figures) {
  const rows = [
    ["tokens/s", number(figures.tokensPerSecond, 1)],
    ["tokens", number(figures.tokens)],
    ["forwards", number(figures.forwards)],
    ["tokens per forward", number(figures.tokensPerForward, 2)],
    ...(figures.withEdits ? [["edits", number(figures.edits)]] : []),
    ...(figures.drafted ? [["drafts kept", `${figures.confirmed} of ${figures.drafted}`]] : []),
    [figures.firstName, seconds(figures.first)],
    [figures.whole ? "in all" : "so far", seconds(figures.seconds)],
  ];
  if (list.children.length !== rows.length) {
    list.replaceChildren(...rows.map(() => {
      const row = document.createElement("div");
      row.append(document.createElement("dt"), document.createElement("dd"));
      return row;
    }));
  }
  rows.forEach(([name, value], at) => {
    const [term, data] = list.children[at].children;
    if (term.textContent !== name) term.textContent = name;
    if (data.textContent !== value) data.textContent = value;
  });
}

/** What stands behind a ratio of speeds. */
function because(diffusion, parent, name) {
  const forwards = `${number(diffusion.tokensPerForward, 2)} tokens per forward against ${number(parent.tokensPerForward, 2)}.`;
  return diffusion.cached > 0 ? `${forwards} The ${name} had ${diffusion.cached} tokens of the prompt in its cache.` : forwards;
}

/** Who was faster, and how: `ratio` is the speed of `name` over the parent's. */
function faster(ratio, name) {
  const [fast, slow] = ratio >= 1 ? [name, "AR parent"] : ["AR parent", name];
  return { fast, slow, times: (value) => (ratio >= 1 ? value : 1 / value).toFixed(2) };
}

/** One sentence about two finished answers: what one run each can tell. */
export function verdict(diffusion, parent, name = "diffusion model") {
  if (!diffusion.tokensPerSecond || !parent.tokensPerSecond) return "";
  const ratio = diffusion.tokensPerSecond / parent.tokensPerSecond;
  const { fast, slow, times } = faster(ratio, name);
  return `This once the ${fast} was ${times(ratio)} times as fast as the ${slow}: ${because(diffusion, parent, name)}`;
}

/** What exact mode promises, looked at. */
export function sameText(one, other) {
  return one === other ? "Both wrote the same text."
    : "The texts differ: 16-bit numbers depend on how many rows a forward has. In fp32 they do not.";
}

/**
 * What repeats tell, each a pair of runs right after each other: the median of their ratios, and its range.
 * @param {{diffusion: Figures, parent: Figures}[]} pairs
 */
export function verdictOf(pairs, name = "diffusion model") {
  const ratios = pairs.map(({ diffusion, parent }) => diffusion.tokensPerSecond / parent.tokensPerSecond)
    .filter((ratio) => Number.isFinite(ratio) && ratio > 0).sort((one, other) => one - other);
  if (ratios.length === 0) return "";
  const half = (ratios.length - 1) / 2;
  const median = (ratios[Math.floor(half)] + ratios[Math.ceil(half)]) / 2;
  const { fast, slow, times } = faster(median, name);
  const range = [times(ratios[0]), times(ratios.at(-1))].sort((one, other) => one - other).join(" to ");
  const found = ratios[0] < 1 && ratios.at(-1) > 1
    ? `neither was faster every time; the ${fast} was ${times(median)} times as fast as the ${slow} in the median (${range})`
    : `the ${fast} was ${times(median)} times as fast as the ${slow} in the median (${range})`;
  const { diffusion, parent } = pairs.at(-1);
  return `In ${ratios.length} runs each, in turns, ${found}: ${because(diffusion, parent, name)}`;
}

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
 *   first: ?number, seconds: ?number, firstName: string, withEdits: boolean}} Figures
 */

/** Draw figures into a definition list; updated in place, so that nothing moves while they grow. */
export function drawFigures(list, figures) {
  const rows = [
    ["tokens/s", number(figures.tokensPerSecond, 1)],
    ["tokens", number(figures.tokens)],
    ["forwards", number(figures.forwards)],
    ["tokens per forward", number(figures.tokensPerForward, 2)],
    ...(figures.withEdits ? [["edits", number(figures.edits)]] : []),
    [figures.firstName, seconds(figures.first)],
    ["in all", seconds(figures.seconds)],
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

/** One sentence that compares two finished answers. */
export function verdict(diffusion, parent) {
  if (!diffusion.tokensPerSecond || !parent.tokensPerSecond) return "";
  const ratio = diffusion.tokensPerSecond / parent.tokensPerSecond;
  const tokens = `${number(diffusion.tokensPerForward, 2)} tokens per forward against ${number(parent.tokensPerForward, 2)}`;
  const [fast, slow] = ratio >= 1 ? ["diffusion model", "AR parent"] : ["AR parent", "diffusion model"];
  const times = Math.max(ratio, 1 / ratio).toFixed(2);
  return `Here the ${fast} was ${times} times as fast as the ${slow}: ${tokens}.`
    + ` One run each, one after the other; on a busy machine another may come out differently.`;
}

/** Errors in words, in the place where they happened. */

/** Show `problem` in `box` (an alert), its hint below it; null takes it away. */
export function showProblem(box, problem) {
  box.hidden = problem === null;
  if (problem === null) {
    box.replaceChildren();
    return;
  }
  const what = document.createElement("b");
  what.textContent = problem.message;
  box.replaceChildren(what, problem.hint ?? "");
}

/** Mark the fields that an error is about; all others are taken to be right. */
export function markFields(fields, names) {
  for (const [name, field] of Object.entries(fields)) {
    if (names.includes(name)) field.setAttribute("aria-invalid", "true");
    else field.removeAttribute("aria-invalid");
  }
}

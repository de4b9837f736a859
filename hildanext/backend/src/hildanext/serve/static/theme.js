// Runs before the page is drawn, so that a chosen theme does not flash. Without a choice the system's is taken.
"use strict";
(function () {
  var NAME = "hilda-theme";
  var root = document.documentElement;

  function stored() {
    try { return localStorage.getItem(NAME); } catch (problem) { return null; }  // storage may be forbidden
  }

  function isDark() {
    if (root.dataset.theme) return root.dataset.theme === "dark";
    return matchMedia("(prefers-color-scheme: dark)").matches;
  }

  function label(button) {
    button.textContent = isDark() ? "Light" : "Dark";
    button.setAttribute("aria-label", "Switch to the " + (isDark() ? "light" : "dark") + " theme");
  }

  if (stored() === "dark" || stored() === "light") root.dataset.theme = stored();
  document.addEventListener("DOMContentLoaded", function () {
    var button = document.getElementById("theme");
    label(button);
    button.addEventListener("click", function () {
      root.dataset.theme = isDark() ? "light" : "dark";
      try { localStorage.setItem(NAME, root.dataset.theme); } catch (problem) { /* the choice lasts as long as the page */ }
      label(button);
    });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", function () { label(button); });
  });
})();

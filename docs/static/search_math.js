// Search excerpts are the text of a page before MathJax: show formulas without their markup.
document.addEventListener("DOMContentLoaded", () => {
  if (typeof Search === "undefined") return;
  const whole = Search.htmlToText;
  Search.htmlToText = (...page) => whole(...page)
    .replace(/\\[()[\]]/g, "").replace(/\\(?:begin|end)\{\w+\*?\}/g, "").replace(/\\([A-Za-z]+)/g, "$1 ").replace(/[\\{}]/g, "");
});

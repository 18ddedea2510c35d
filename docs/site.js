// Sets formulas. In notebooks they stand between dollars, and elsewhere in brackets.
document.addEventListener("DOMContentLoaded", () => {
  const brackets = [
    { left: "\\[", right: "\\]", display: true },
    { left: "\\(", right: "\\)", display: false },
  ];
  const dollars = [
    { left: "$$", right: "$$", display: true },
    { left: "$", right: "$", display: false },
  ];
  const set = (selector, delimiters) =>
    document.querySelectorAll(selector).forEach((node) =>
      renderMathInElement(node, { delimiters }));
  set(".arithmatex", brackets);
  set(".jp-RenderedMarkdown", dollars);
});

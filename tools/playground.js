() => {
  // Ctrl-Enter generates and Escape stops, in the tab that is visible.
  const click = (label) =>
    [...document.querySelectorAll("button")]
      .find((button) => button.textContent.trim() === label && button.offsetParent)
      ?.click();
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) click("Generate");
    if (event.key === "Escape") click("Stop");
  });
}

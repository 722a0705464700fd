"use strict";
// Whatever comes from the data goes into textContent, never into markup.

const ANSWERS = {
  pairs: [
    ["left", "A is better", "ArrowLeft", "←"],
    ["right", "B is better", "ArrowRight", "→"],
    ["tie", "Tie", "t", "T"],
    ["skip", "Skip", "s", "S"],
  ],
  thumbs: [
    ["up", "Good", "y", "Y"],
    ["down", "Bad", "n", "N"],
    ["skip", "Skip", "s", "S"],
  ],
};
const MAIN = ["left", "right", "up", "down"];
const SAID = {
  left: "A is better", right: "B is better", tie: "tie", skip: "skipped", up: "good", down: "bad",
};
let state = null;
let busy = false;

const at = (id) => document.getElementById(id);

function made(tag, text, name) {
  const element = document.createElement(tag);
  if (text) element.textContent = text;
  if (name) element.className = name;
  return element;
}

async function ask(path, body) {
  const options = body && {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ turn: state.turn, ...body }),
  };
  const answer = await fetch(path, options || {});
  if (answer.status !== 200 && answer.status !== 409) throw new Error(await answer.text());
  state = await answer.json();
  return answer.status === 200;
}

async function send(path, body, words) {
  if (busy || !state || state.over) return;
  busy = true;
  try {
    const done = await ask(path, body);
    show();
    at("said").textContent = done ? words : "This question has moved on; look again.";
  } catch {
    at("said").textContent =
      "The server has stopped. Your answers so far are saved; start it again with the same command.";
  } finally {
    busy = false;
  }
}

const choose = (choice) => send("choose", { choice }, `Saved: ${SAID[choice]}`);
const undo = () => send("undo", {}, "Taken back");
const finish = () => send("finish", {}, "");
const complete = () => state.done === state.all;

function button(name, words, key, shown, act) {
  const element = made("button", words, MAIN.includes(name) ? "main" : "");
  element.type = "button";
  element.id = `do-${name}`;
  if (key) {
    const sign = made("kbd", shown);
    sign.setAttribute("aria-hidden", "true");
    element.append(sign);
    element.setAttribute("aria-keyshortcuts", key);
  }
  element.addEventListener("click", act);
  return element;
}

function buttons() {
  const answers = ANSWERS[state.mode].map(([name, words, key, shown]) =>
    button(name, words, key, shown, () => choose(name)));
  at("buttons").replaceChildren(
    ...answers,
    button("undo", "Undo", "u", "U", undo),
    button("finish", "Stop", "", "", finish),
  );
}

function show() {
  if (!at("buttons").children.length) buttons();
  const ended = complete() || state.over;
  const pairs = state.mode === "pairs";
  at("bar").max = state.all;
  at("bar").value = state.done;
  at("count").textContent = `${state.done} of ${state.all} answered`;
  at("question").textContent = state.over ? "Done"
    : ended ? "All questions are answered" : pairs ? "Which answer is better?" : "Is this a good answer?";
  at("prompt").replaceChildren(...state.prompt.map(turn));
  at("prompt").hidden = at("texts").hidden = ended;
  at("texts").className = pairs ? "two" : "";
  at("texts").replaceChildren(...state.texts.map((text, i) => completion(text, pairs ? "AB"[i] : "")));
  at("end").hidden = !ended;
  at("end").replaceChildren(...ended ? closing() : []);
  for (const [name] of ANSWERS[state.mode]) at(`do-${name}`).hidden = ended;
  at("do-undo").disabled = state.done === 0;
  at("buttons").hidden = state.over;
  at("do-finish").textContent = complete() ? "Finish" : "Stop";
  at("do-finish").className = complete() ? "main" : "";
  document.title = `${state.done} of ${state.all} - lora-dpo label`;
  window.scrollTo(0, 0);
}

function turn({ role, text }) {
  const element = made("div", "", "turn");
  element.append(made("h2", role || "Prompt"), made("div", text, "text"));
  element.lastChild.dir = "auto";
  return element;
}

function completion(text, name) {
  const element = made("section", "", "completion");
  element.setAttribute("aria-label", name ? `answer ${name}` : "answer");
  element.append(made("h2", name ? `Answer ${name}` : "Answer"), made("div", text, "text"));
  element.lastChild.dir = "auto";
  return element;
}

function closing() {
  const counts = Object.entries(state.counts).map(([name, count]) => `${SAID[name]}: ${count}`);
  const next = state.over ? "Your answers are saved. You can close this page."
    : "Finish writes the file of preferences and ends; Undo goes back.";
  return [made("p", counts.join(", ")), made("p", next)];
}

document.addEventListener("keydown", (event) => {
  if (event.repeat || event.ctrlKey || event.altKey || event.metaKey || !state) return;
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  const found = ANSWERS[state.mode].find((answer) => answer[2] === key);
  if (found && !complete()) choose(found[0]);
  else if (key === "u" && state.done) undo();
  else return;
  event.preventDefault();
});

ask("state").then(show, () => { at("question").textContent = "The server does not answer."; });

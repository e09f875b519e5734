// The operator's page: draws each status that the server sends, and asks for the token only to act. No text is ever
// read as HTML, and nothing is kept in the browser.

const at = (id) => document.getElementById(id);
const DAY = 86_400_000;
const SOON = 14 * DAY;
const STALE = 15_000; // three beats without a word
const PHASES = ["planned", "drawn", "training", "aggregating", "charged", "released"];
const REFUSED = {
  malformed: "malformed",
  error: "device failed",
  late: "too late",
  duplicate: "sent twice",
  "not asked": "were not asked",
  "wrong round": "for another round",
  unsealed: "not sealed",
  unreadable: "unreadable",
  other: "other",
};
const NOW = {
  planned: "is planned",
  drawn: "has drawn its cohort",
  training: "is waiting for answers",
  aggregating: "is adding up the answers",
  charged: "is charged to the ledger",
  released: "is released",
  abandoned: "was abandoned",
};
const TRUST = { server: "the server, which sees each contribution", "own device": "the person’s own device" };

let status; // the newest that was told
let ahead = 0; // of this clock before the server's, in ms
let heard = 0; // when the server last said anything, by this clock
let drawn = 0; // the server's time when all was drawn
let broken = false; // the connection to it
let token = ""; // in memory alone

const now = () => Date.now() - ahead;
const count = (n) => n.toLocaleString("en");
const many = (n, word) => `${count(n)} ${word}${n === 1 ? "" : "s"}`;
const clock = (ms) => new Date(ms).toLocaleTimeString("en-GB");
const date = (ms) => new Date(ms).toLocaleString("en-GB", { dateStyle: "medium", timeStyle: "short" });
const sentence = (words) => `${words[0].toUpperCase()}${words.slice(1)}${/[.!?]$/.test(words) ? "" : "."}`;
const digits = (x) => (x === 0 ? "0" : Number(x.toPrecision(3)).toString());

/** An ε to three digits, never below itself: it is an upper bound. */
function above(epsilon) {
  if (epsilon <= 0) return "0";
  const unit = 10 ** (Math.floor(Math.log10(epsilon)) - 2);
  return digits(Math.ceil(epsilon / unit - 1e-9) * unit);
}

/** Three digits, never above: of what is left. */
function below(x) {
  if (x <= 0) return "0";
  const unit = 10 ** (Math.floor(Math.log10(x)) - 2);
  return digits(Math.floor(x / unit + 1e-9) * unit);
}

/** A length of time in its two largest units. */
function long(ms) {
  const s = Math.max(0, Math.round(ms / 1000));
  const parts = [[Math.floor(s / 86400), "d"], [Math.floor(s / 3600) % 24, "h"], [Math.floor(s / 60) % 60, "min"], [s % 60, "s"]];
  const first = parts.findIndex(([n]) => n);
  if (first < 0) return "0 s";
  return parts.slice(first, first + 2).filter(([n]) => n).map(([n, unit]) => `${n} ${unit}`).join(" ");
}

/** An element; of `set`, a key with a hyphen is an attribute and any other a property. */
function make(tag, set = {}, ...inside) {
  const made = document.createElement(tag);
  for (const [key, value] of Object.entries(set)) {
    if (key.includes("-")) made.setAttribute(key, value);
    else made[key] = value;
  }
  made.append(...inside);
  return made;
}

/** New text, only where it differs: what is announced is what changed. */
function tell(id, words) {
  if (at(id).textContent !== words) at(id).textContent = words;
}

const pair = ([name, value]) => [make("dt", {}, name), make("dd", {}, value)];
const mark = (kind, words) => make("span", { className: `mark ${kind}` }, words);

/** Words and a mark for something that ends: by when, and whether that is soon. */
function ending(ms) {
  const left = ms - now();
  if (left <= 0) return [mark("bad", "Expired"), `on ${date(ms)}`];
  return [left < SOON ? mark("soon", "Renew soon") : mark("good", "Valid"), `for ${long(left)}, until ${date(ms)}`];
}

function row(name, [state, words], about = "") {
  const head = make("p", { className: "row" }, make("strong", {}, name), state);
  return make("li", {}, head, make("p", { className: "quiet" }, words), ...(about ? [make("p", { className: "quiet" }, about)] : []));
}

// ----------------------------------------------------------------------------------------------------------- rounds

/** How many of the cohort came how far, with the reasons of those that did not. */
function funnel({ phase, drawn, asked, answered, refused, silent }) {
  const most = Math.max(drawn, asked, 1);
  const line = (words, n, kind = "") => {
    const bar = make("div", { className: "bar", "aria-hidden": "true" }, make("i"));
    bar.style.setProperty("--share", `${(100 * n) / most}%`);
    return make("li", { className: kind }, make("div", {}, words), make("span", {}, count(n)), bar);
  };
  const lines = [line("Users drawn", drawn), line("Nodes asked", asked)];
  const waiting = PHASES.indexOf(phase) >= 0 && PHASES.indexOf(phase) < PHASES.indexOf("aggregating");
  if (!waiting) {
    lines.push(line("Answered", answered));
    const reasons = Object.entries(refused);
    if (reasons.length) lines.push(line("Refused", reasons.reduce((sum, [, n]) => sum + n, 0), "lost"));
    lines.push(...reasons.map(([reason, n]) => line(REFUSED[reason], n, "part lost")));
    if (silent) lines.push(line("Silent", silent, "none"));
  }
  return make("ul", { className: "funnel", "aria-label": "From drawn to answered" }, ...lines);
}

const title = (one) => `Round ${one.round}${one.attempt ? `, try ${one.attempt + 1}` : ""}`;

function drawRound() {
  const one = status.recent[0];
  at("steps").hidden = at("funnel").hidden = !one;
  at("start").hidden = status.running || status.rounds_left === 0;
  at("pause").hidden = !status.running;
  tell("progress", status.rounds ? `${count(status.done)} of ${many(status.rounds, "round")} of the plan ${status.done === 1 ? "is" : "are"} released.` : "");
  if (!one) {
    tell("since", "");
    return tell("now", status.running ? "No round yet: the first will be planned." : "No round yet.");
  }
  tell("now", `${title(one)} (${one.sum}) ${NOW[one.phase]}${one.why ? `: ${one.why}` : ""}.`);
  const line = one.phase === "abandoned" ? [...PHASES.filter((phase) => phase in status.steps), "abandoned"] : PHASES;
  const reached = line.indexOf(one.phase);
  at("steps").style.setProperty("--n", line.length);
  at("steps").replaceChildren(
    ...line.map((phase, place) => {
      const kind = phase === "abandoned" ? "bad" : phase === "released" && place === reached ? "past" : place < reached ? "past" : place === reached ? "at" : "";
      const sign = { bad: "✕", past: "✓", at: "●" }[kind] ?? "";
      const time = status.steps[phase] ? [make("time", {}, clock(status.steps[phase]))] : [];
      const step = make("li", { className: kind }, make("i", { "aria-hidden": "true" }, sign), make("span", {}, phase), ...time);
      if (place === reached) step.setAttribute("aria-current", "step");
      return step;
    }),
  );
  at("funnel").replaceChildren(funnel(one));
}

function drawRounds() {
  const { released, abandoned, drawn, answered } = status.totals;
  const earlier = status.recent.slice(["released", "abandoned"].includes(status.phase) ? 0 : 1);
  at("no-rounds").hidden = earlier.length > 0;
  tell("totals", earlier.length ? `${count(released)} released, ${count(abandoned)} abandoned; ${many(drawn, "user")} drawn, ${many(answered, "answer")} accepted.` : "");
  const open = new Set([...document.querySelectorAll("#rounds details[open]")].map((one) => one.dataset.key));
  const focused = document.activeElement?.closest("#rounds details")?.dataset.key;
  at("rounds").replaceChildren(
    ...earlier.map((one) => {
      const refused = Object.values(one.refused).reduce((sum, n) => sum + n, 0);
      const kind = one.phase === "released" ? "good" : one.phase === "abandoned" ? "bad" : "wait";
      const words = [title(one), one.sum, `${count(one.answered)} of ${many(one.asked, "node")} answered`];
      if (refused) words.push(`${count(refused)} refused`);
      if (one.why) words.push(one.why);
      words.push(date(one.at_ms));
      const details = make("details", {}, make("summary", {}, mark(kind, sentence(one.phase).slice(0, -1)), ` ${words.join(" · ")}`), funnel(one));
      if (one.seconds) details.append(make("p", { className: "quiet" }, `From draw to end: ${long(1000 * one.seconds)}.`));
      details.dataset.key = `${one.round}/${one.attempt}/${one.at_ms}`;
      details.open = open.has(details.dataset.key);
      return make("li", {}, details);
    }),
  );
  if (focused) [...document.querySelectorAll("#rounds details")].find((one) => one.dataset.key === focused)?.querySelector("summary").focus();
}

// ---------------------------------------------------------------------------------------------------------- privacy

function drawPrivacy() {
  const { privacy, unit } = status;
  at("spent").hidden = !privacy;
  at("no-privacy").hidden = !!privacy;
  if (!privacy) return tell("no-privacy", unit === "none" ? "Nothing is promised: this plan adds no noise, and its numbers are exact." : "The ledger cannot be read.");
  const { guarantee, at_end: end, budget } = privacy;
  const most = Math.max(budget ?? end, guarantee.epsilon);
  const share = (x) => `${most ? Math.min(100, (100 * x) / most) : 0}%`;
  tell("epsilon", `ε = ${above(guarantee.epsilon)} at δ = ${digits(guarantee.delta)}, spent so far`);
  at("gauge").style.setProperty("--spent", share(guarantee.epsilon));
  at("gauge").style.setProperty("--end", `calc(${share(end)} - .1875rem)`);
  at("gauge").setAttribute("aria-valuenow", guarantee.epsilon);
  at("gauge").setAttribute("aria-valuemax", most);
  at("gauge").setAttribute("aria-valuetext", `ε ${above(guarantee.epsilon)} of ${above(most)}`);
  const scale = ["0", `Plan’s end: ε = ${above(end)}`];
  if (budget !== null) scale.push(end > budget ? `Budget: ε = ${digits(budget)}, before the plan’s end` : `Budget: ε = ${digits(budget)}`);
  at("scale").replaceChildren(...scale.map((words) => make("li", { className: "quiet" }, words)));
  const spare = budget === null ? "" : `, ε = ${below(budget - guarantee.epsilon)} of the budget is left`;
  tell("left", `${many(status.rounds_left, "round")} left${spare}.`);
  at("words").replaceChildren(
    ...[
      ["Unit", `${guarantee.unit}: ${guarantee.neighbours}`],
      ["Sampling", guarantee.sampler],
      ["Accountant", guarantee.accountant],
      ["Trusted", TRUST[guarantee.trust] ?? guarantee.trust],
      ["Not charged", guarantee.uncharged.length ? guarantee.uncharged.join("; ") : "nothing"],
    ].flatMap(pair),
  );
}

// ------------------------------------------------------------------------------------------ models and what else is

function drawModels() {
  at("channels").replaceChildren(
    ...status.channels.map((one) => row(`${one.name}: version ${one.version}`, ending(one.expires_ms), `Pointer ${one.sequence}, since ${date(one.since_ms)}.`)),
  );
  if (!status.channels.length) at("channels").append(make("li", {}, "No channel has a model."));
  const [stable, candidate] = ["stable", "candidate"].map((name) => status.channels.find((one) => one.name === name));
  at("promote").hidden = !candidate || candidate.version <= (stable?.version ?? 0);
  if (candidate) tell("promote", `Promote version ${candidate.version} to stable…`);
  at("rollback").hidden = !status.moves.some((one) => one.channel === "stable" && one.version < (stable?.version ?? 0));
  at("history").hidden = !status.moves.length;
  at("moves").replaceChildren(
    ...status.moves.map((one) => make("li", {}, make("p", {}, `${one.channel}: version ${one.version}`), make("p", { className: "quiet" }, `${date(one.at_ms)}${one.why ? ` · ${one.why}` : ""}`))),
  );
}

const CERTIFICATES = { "release key": "Release key", TLS: "TLS of this server", "TLS authority": "TLS authority" };

function drawRest() {
  at("certificates").replaceChildren(...status.certificates.map((one) => row(CERTIFICATES[one.name], ending(one.expires_ms))));
  const { roster } = status;
  at("roster").replaceChildren(
    ...[
      ...(roster ? [["Places taken", count(roster.active)], ["Left", count(roster.left)], ["Free", count(roster.free)]] : []),
      ["Disk free", `${digits(status.disk_free / 2 ** 30)} of ${digits(status.disk_size / 2 ** 30)} GiB`],
      ["Software", `penchant ${status.software}`],
    ].flatMap(pair),
  );
  const problems = status.missing.map((one) => `${one.part}: ${one.why}`);
  if (status.clock_behind_ms > 1000) problems.push(`clock: it is ${long(status.clock_behind_ms)} behind what was written before; set it`);
  at("missing").hidden = !problems.length;
  at("problems").replaceChildren(...problems.map((words) => make("li", {}, mark("bad", ""), sentence(words))));
}

function drawBanner() {
  const words = status.why ? `No new round begins: ${status.why}.` : "";
  if (at("banner").textContent === words) return;
  at("banner").replaceChildren(...(words ? [make("p", { className: /budget/.test(words) ? "bad" : "" }, words)] : []));
}

function draw() {
  drawn = now();
  at("app").hidden = false;
  tell("name", `${status.app_id} / ${status.population}`);
  document.title = `${status.recent.length ? `${title(status.recent[0])} ${status.phase}` : "no round yet"} – ${status.app_id}`;
  drawBanner();
  drawRound();
  drawRounds();
  drawPrivacy();
  drawModels();
  drawRest();
}

/** What changes with the clock alone. */
function tick() {
  const quiet = Date.now() - heard;
  const lost = heard && (quiet > STALE || broken);
  document.body.classList.toggle("lost-link", Boolean(lost));
  if (!heard) return;
  at("link").className = `mark ${lost ? "bad" : "good"}`;
  tell("link", lost ? "Connection lost" : "Live");
  tell("as-of", lost ? `Shown is what was so at ${clock(heard - ahead)}; trying again` : `as of ${clock(heard - ahead)}`);
  const one = status.recent[0];
  if (!one) return;
  const going = !["released", "abandoned"].includes(one.phase);
  const over = now() - one.at_ms - 1000 * status.deadline_s;
  const late = one.phase === "training" && over > 0 ? `; its deadline was ${long(over)} ago` : "";
  const wait = one.phase === "training" && over <= 0 ? `; answers are awaited for ${long(-over)} more` : "";
  tell("since", going ? `For ${long(now() - one.at_ms)}${late}${wait}.` : `${long(now() - one.at_ms)} ago.`);
}

// ------------------------------------------------------------------------------------------------------- the server

function watch() {
  const source = new EventSource("/ui/events");
  const hear = (ms) => {
    heard = Date.now();
    ahead = heard - ms;
    broken = false;
  };
  source.onmessage = ({ data }) => {
    status = JSON.parse(data);
    hear(status.at_ms);
    draw();
    tick();
  };
  source.addEventListener("beat", ({ data }) => {
    hear(Number(data));
    if (Math.abs(now() - drawn) > 60_000) draw(); // what is left of certificates goes on by itself
    tick();
  });
  source.onerror = () => {
    broken = true;
    tick();
    if (source.readyState !== EventSource.CLOSED) return; // it tries again by itself
    if (!heard) tell("link", "The server does not answer");
    setTimeout(watch, 5000);
  };
}

watch();
setInterval(tick, 1000);

// ------------------------------------------------------------------------------------------------------ the actions

const ACTIONS = {
  start: () => ["rounds/start", "Start rounds?", "Devices are asked for contributions until the plan or its budget is at an end, or you pause.", "Start", "Rounds start."],
  pause: () => ["rounds/pause", "Pause rounds?", "The round under way is finished first. Nothing is lost.", "Pause", "Rounds pause after this one."],
  promote: () => {
    const { version } = status.channels.find((one) => one.name === "candidate");
    return ["models/promote", `Promote version ${version}?`, "Every device gets it at its next sync.", "Promote", `Version ${version} is stable.`, { version }];
  },
  rollback: () => ["models/rollback", "Go back to the model before?", "Every device gets it at its next sync. What was spent stays spent.", "Go back", "The model before is stable again."],
};

let action;

function ask(name) {
  action = ACTIONS[name]();
  tell("h-sure", action[1]);
  tell("about", action[2]);
  tell("yes", action[3]);
  tell("refused", "");
  at("ask").hidden = at("token-about").hidden = token !== "";
  at("token").value = "";
  at("sure").showModal();
  (token ? at("no") : at("token")).focus();
}

for (const name of Object.keys(ACTIONS)) at(name).onclick = () => ask(name);
at("no").onclick = () => at("sure").close();
at("form").onsubmit = async (event) => {
  event.preventDefault();
  const [path, , , , done, body = {}] = action;
  const sent = token || at("token").value.trim();
  if (!sent) return tell("refused", "Give the admin token.");
  if (!/^[\x21-\x7e]+$/.test(sent)) return tell("refused", "That is no admin token.");
  at("yes").disabled = true;
  const reply = await fetch(`/v1/${path}`, { method: "POST", headers: { Authorization: `Bearer ${sent}` }, body: JSON.stringify(body) }).catch(() => null);
  const answer = await reply?.json().catch(() => ({}));
  at("yes").disabled = false;
  token = reply?.status === 401 ? "" : sent;
  if (reply?.ok) {
    at("sure").close();
    return say(done);
  }
  at("ask").hidden = at("token-about").hidden = token !== "";
  tell("refused", !reply ? "The server does not answer; nothing was done." : reply.status === 401 ? "That is not the admin token." : sentence(answer?.error ?? "That is not possible here"));
  if (!token) at("token").focus();
};

let quietly;

/** Tells the person, by eye and by ear. */
function say(words) {
  clearTimeout(quietly);
  at("said").textContent = words;
  quietly = setTimeout(() => (at("said").textContent = ""), 10_000);
}

// The page's only script: asks the app for what it shows, and draws that. No text is ever read as HTML.

const at = (id) => document.getElementById(id);
const asked_for = new URLSearchParams(location.search).get("lang"); // else what the browser tells every server
const sent = new URLSearchParams(location.hash.slice(1)).get("token");
if (sent) { // out of the address, so that links on this page do not lose it
  sessionStorage.setItem("token", sent);
  history.replaceState(null, "", "/");
}
const percent = (share) => `${Math.round(100 * share)}%`;
const when = (ms) => new Date(ms).toLocaleString();
const CHINESE = await (await fetch("zh.json")).json();
/** The words in the page's language, which English is the key of, with what stands in {braces} filled in. */
const t = (words, fields = {}) =>
  ((at("language").value === "zh" && CHINESE[words]) || words).replace(/\{(\w+)\}/g, (_, name) => fields[name]);
/** A sentence of what the SDK says; in a language other than English only where it is known. */
const sentence = (words) => {
  const said = t(words);
  if (said !== words) return `${said}。`;
  return `${words[0].toUpperCase()}${words.slice(1)}${/[.!?]$/.test(words) ? "" : "."}`;
};
const RELEASE = {
  updated: "a newer one was taken in",
  up_to_date: "there is no newer one",
  no_server: "this app has no server to ask for a newer one",
  failed: "no newer one was taken in",
};
const AGREED = {
  nobody: "That nothing leaves this device.",
  server: "That the operator’s server may see contributions of this device.",
  "own device": "Only what this device guarantees by itself.",
};

// ---------------------------------------------------------------------------------------------------- asking the app

async function ask(path, body) {
  const options = { headers: { "X-Films": sessionStorage.getItem("token") ?? "" } };
  if (body) Object.assign(options, { method: "POST", body: JSON.stringify(body) });
  const reply = await fetch(`/api/${path}`, options).catch(() => null);
  if (!reply) return say(t("The app has stopped. Start it again, and open the address it prints."), Infinity);
  const answer = await reply.json();
  return reply.ok ? answer : say(sentence(answer.error), Infinity);
}

const get = (path, fields = {}) => ask(`${path}?${new URLSearchParams(fields)}`);

let busy = false;

/** Does one thing and draws what came of it; a second press while it is under way does nothing. */
async function act(name, fields, words) {
  if (busy) return null;
  busy = true;
  const answer = await ask(name, { ...fields, language: at("language").value });
  busy = false;
  if (!answer) return null;
  draw(answer);
  if (words) say(words(answer.result));
  return answer;
}

let quiet;

/** Tells the person, by eye and by ear; what went wrong stays until something else is said. */
function say(words, ms = 10_000) {
  clearTimeout(quiet);
  at("said").textContent = words;
  if (ms < Infinity) quiet = setTimeout(() => (at("said").textContent = ""), ms);
}

// ----------------------------------------------------------------------------------------------------------- drawing

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

const button = (words, about, press, kind = "") =>
  make("button", { type: "button", className: kind, "aria-label": about ? `${words}: ${about}` : words, onclick: press }, words);

/** New content for a list. Whoever was on a button in it goes on from the same place, or from its heading. */
function fill(list, items) {
  const had = list.contains(document.activeElement) ? document.activeElement : null;
  const row = had && [...list.children].findIndex((li) => li.contains(had));
  const column = had && [...list.children[row].querySelectorAll("button")].indexOf(had);
  list.replaceChildren(...items);
  if (!had) return;
  const buttons = list.children[Math.min(row, items.length - 1)]?.querySelectorAll("button");
  (buttons?.[column] ?? list.closest("section").querySelector("h2")).focus();
}

function film({ item, title, topics, why, topic }) {
  const watch = ({ target }) => done(target, t("Watched"), title, act("watch", { item }, () => t("You watched {title}. Your list has changed.", { title })));
  const like = ({ target }) => done(target, t("Liked"), title, act("like", { item }, () => t("You like {title}. Your list has changed.", { title })));
  const about = make("li", {}, make("h3", {}, title), make("p", { className: "quiet" }, topics.join(" · ")));
  const buttons = make("div", { className: "do" }, button(t("Watch"), title, watch, "main"), button(t("Like"), title, like));
  if (why) {
    const unwanted = topic || topics[0];
    about.append(make("p", { lang: at("language").value }, why));
    buttons.append(button(t("Not this film"), title, () => act("not_this_item", { item }, () => t("{title} will not be listed.", { title }))));
    if (unwanted) {
      const no = () => act("not_this_topic", { item, topic: unwanted }, (refused) => t("No more {topic} in your list.", { topic: refused }));
      buttons.append(button(t("Not this topic: {topic}", { topic: unwanted }), "", no));
    }
  }
  about.append(buttons);
  return about;
}

/** Says on a button that is still there what came of it. */
async function done(button, words, about, acted) {
  if (!(await acted)) return;
  button.textContent = words;
  button.ariaLabel = `${words}: ${about}`;
  button.className = "";
}

function share({ topic, share, low, high }, widest) {
  const bar = make("div", { className: "bar", "aria-hidden": "true" }, make("i"), make("b"));
  for (const [name, value] of Object.entries({ share, low, high })) bar.style.setProperty(`--${name}`, `${(100 * value) / widest}%`);
  const words = make("span", { className: "quiet" }, t("{share}, likely {low} to {high}", { share: percent(share), low: percent(low), high: percent(high) }));
  return make("li", {}, make("div", { className: "row" }, make("span", {}, topic), words), bar);
}

function draw(view) {
  at("app").hidden = at("parts").hidden = Boolean(view.receipt);
  at("gone").hidden = !view.receipt;
  if (view.receipt) return drawReceipt(view.receipt);
  fill(at("list"), view.films.map(film));
  at("list-empty").hidden = view.films.length > 0;
  drawInterests(view.interests);
  drawPrivacy(view.privacy);
  if (at("kept").open) drawKept();
}

function drawInterests({ topics, n_events: n, refused }) {
  at("rests-on").textContent = n
    ? t(`Worked out here from ${n === 1 ? "1 thing" : "{n} things"} that you did. Thin lines: where a share lies with 95% certainty.`, { n })
    : t("You have not done anything here yet, so these are everybody’s, and very unsure.");
  const widest = Math.max(...topics.map((one) => one.high));
  at("interests").replaceChildren(...topics.map((one) => share(one, widest)));
  fill(at("refused-topics"), refused.map((topic) => allowed(topic, topic)));
}

const allowed = (refused, title) =>
  make("div", { className: "row" }, t("Not wanted: {title}", { title }), button(t("Allow again"), title, () => act("allow", { refused }, () => t("{title} may be listed again.", { title }))));

function drawPrivacy({ trust, consented_ms: since, left, seen_by: seen, release, trusted, can_leave: canLeave }) {
  at("left").textContent = left.length ? t("{n} contributions", { n: left.length }) : t("Nothing, so far.");
  at("left-each").replaceChildren(
    ...left.map((one) => {
      const words = t(`{when}: round {round}, {bytes} bytes, ${one.sealed ? "sealed" : "not sealed"}`, { when: when(one.at_ms), round: one.round, bytes: one.n_bytes });
      return make("li", {}, words);
    }),
  );
  at("seen-by").textContent = sentence(seen);
  at("agreed").textContent = t(AGREED[trust]) + (since ? t(" Said {when}.", { when: when(since) }) : "");
  at("promise").textContent = release ? `${release}.` : t("Nothing: it was made of exact sums, and is not private.");
  at("trusted").textContent = trusted.length ? sentence(trusted.map((one) => t(one)).join("; ")) : t("Nothing: it checks all of the promise.");
  at("no-plan").hidden = canLeave;
  at("consent").setAttribute("aria-checked", String(trust !== "nobody"));
}

async function drawKept() {
  const kept = await get("kept");
  if (!kept) return;
  const events = kept.events.map((one) => make("li", {}, `${kept.titles[one.item]} — ${one.kind}, ${when(one.at_ms)}`)).reverse();
  const refused = kept.refused_items.map((item) => make("li", {}, allowed(item, kept.titles[item])));
  fill(at("events"), [...refused, ...events]);
  if (!at("events").children.length) at("events").append(make("li", {}, t("Nothing yet.")));
}

function drawReceipt({ key_destroyed: destroyed, kept, lost }) {
  at("key").textContent = t(destroyed ? "Destroyed: what was written with it can no longer be read by anybody." : "Still there.");
  const stays = Object.entries(kept).map(([name, value]) => `${name.replaceAll("_", " ")}: ${value}`);
  at("stays").textContent = stays.length ? t("{stays}. Nothing of what you did.", { stays: stays.join(", ") }) : t("Nothing.");
  at("lost").textContent = sentence(lost);
  at("h-gone").focus();
}

// -------------------------------------------------------------------------------------------------------- the browser

let asked = 0;

/** Films that fit the form: the first page, or one more. */
async function browse(more = false) {
  const mine = ++asked;
  const after = more ? at("found").children.length : 0;
  const answer = await get("films", { words: at("words").value, topic: at("topics").value, after });
  if (!answer || mine !== asked) return; // a later search is under way
  const made = answer.films.map(film);
  if (more) at("found").append(...made);
  else at("found").replaceChildren(...made);
  at("n-found").textContent = t(answer.n === 1 ? "1 film" : "{n} films", { n: answer.n.toLocaleString("en") });
  at("more").hidden = at("found").children.length >= answer.n;
  if (more) made[0]?.querySelector("button").focus();
}

let typing;
at("words").oninput = () => {
  clearTimeout(typing);
  typing = setTimeout(browse, 200);
};
at("topics").onchange = () => browse();
at("more").onclick = () => browse(true);
at("search").onsubmit = (event) => {
  event.preventDefault();
  browse();
};

// ------------------------------------------------------------------------------------------------------- the controls

/** What page.html says, in the page's language; the English of each text stays with it. */
function translate() {
  const language = at("language").value;
  document.documentElement.lang = language;
  const own = document.createTreeWalker(document.documentElement, NodeFilter.SHOW_TEXT);
  while (own.nextNode()) {
    const node = own.currentNode;
    const words = (node.english ??= node.textContent.replace(/\s+/g, " "));
    const known = CHINESE[words.trim()];
    if (known) node.textContent = language === "zh" ? known : words;
  }
  for (const [id, name, words] of [["words", "placeholder", "such as alien 1979"], ["events", "aria-label", "What you did, newest first"], ["parts", "aria-label", "On this page"]])
    at(id).setAttribute(name, t(words));
}

at("language").onchange = async () => {
  translate();
  browse();
  const answer = await get("me", { language: at("language").value });
  if (answer) draw(answer);
};
at("consent").onclick = () => {
  const trust = at("consent").getAttribute("aria-checked") === "true" ? "nobody" : "server";
  const words = t(trust === "server" ? "You agreed. Withdraw here at any time." : "Withdrawn: nothing will leave this device.");
  act("agree", { trust }, () => words);
};
at("sync").onclick = async () => {
  at("synced").textContent = t("Looking…");
  const { result } = (await act("sync", {})) ?? {};
  if (!result) return (at("synced").textContent = "");
  const model = t("Model: {release}; version {version} is in use.", { release: t(RELEASE[result.release]), version: result.version });
  at("synced").textContent = `${model} ${result.sentence} ${result.why && sentence(result.why)}`;
};
at("kept").ontoggle = () => at("kept").open && drawKept();
at("copy").onclick = async () => {
  const kept = await get("kept");
  if (!kept) return;
  const address = URL.createObjectURL(new Blob([JSON.stringify(kept, null, 2)], { type: "application/json" }));
  make("a", { href: address, download: "films-about-me.json" }).click();
  URL.revokeObjectURL(address);
};
at("forget").onclick = () => at("sure").showModal();
at("sure").onclose = async () => {
  if (at("sure").returnValue === "yes") await act("forget", { rounds: at("rounds").checked ? "too" : "stay" }, () => "");
  at("sure").returnValue = "";
  at("rounds").checked = false;
};
at("begin").onclick = async () => {
  if (await act("begin", {}, () => t("A new start."))) at("h-list").focus();
};

at("language").value = (asked_for ?? navigator.language).startsWith("zh") ? "zh" : "en";
translate();
const [catalogue, mine] = [await get("catalogue"), await get("me", { language: at("language").value })];
if (catalogue && mine) {
  at("topics").append(...catalogue.topics.map((topic) => make("option", { value: topic }, topic)));
  at("terms").hidden = !catalogue.name.startsWith("ml-");
  draw(mine);
  browse();
}

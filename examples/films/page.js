// The page's only script: asks the app for what it shows, and draws that. No text is ever read as HTML.

const at = (id) => document.getElementById(id);
const sent = new URLSearchParams(location.hash.slice(1)).get("token");
if (sent) { // out of the address, so that links on this page do not lose it
  sessionStorage.setItem("token", sent);
  history.replaceState(null, "", "/");
}
const percent = (share) => `${Math.round(100 * share)}%`;
const when = (ms) => new Date(ms).toLocaleString();
const sentence = (words) => `${words[0].toUpperCase()}${words.slice(1)}${/[.!?]$/.test(words) ? "" : "."}`;
const WHY_NO_ROUND = { no_fleet: "this app has no server to take part with" };
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
  if (!reply) return say("The app has stopped. Start it again, and open the address it prints.", Infinity);
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
  const watch = ({ target }) => done(target, "Watched", title, act("watch", { item }, () => `You watched ${title}. Your list has changed.`));
  const like = ({ target }) => done(target, "Liked", title, act("like", { item }, () => `You like ${title}. Your list has changed.`));
  const about = make("li", {}, make("h3", {}, title), make("p", { className: "quiet" }, topics.join(" · ")));
  const buttons = make("div", { className: "do" }, button("Watch", title, watch, "main"), button("Like", title, like));
  if (why) {
    const unwanted = topic || topics[0];
    about.append(make("p", { lang: at("language").value }, why));
    buttons.append(button("Not this film", title, () => act("not_this_item", { item }, () => `${title} will not be listed.`)));
    if (unwanted) {
      const no = () => act("not_this_topic", { item, topic: unwanted }, (refused) => `No more ${refused} in your list.`);
      buttons.append(button(`Not this topic: ${unwanted}`, "", no));
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
  const words = make("span", { className: "quiet" }, `${percent(share)}, likely ${percent(low)} to ${percent(high)}`);
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
    ? `Worked out here from ${n} ${n === 1 ? "thing" : "things"} that you did. Thin lines: where a share lies with 95% certainty.`
    : "You have not done anything here yet, so these are everybody’s, and very unsure.";
  const widest = Math.max(...topics.map((one) => one.high));
  at("interests").replaceChildren(...topics.map((one) => share(one, widest)));
  fill(at("refused-topics"), refused.map((topic) => allowed(topic, topic)));
}

const allowed = (refused, title) =>
  make("div", { className: "row" }, `Not wanted: ${title}`, button("Allow again", title, () => act("allow", { refused }, () => `${title} may be listed again.`)));

function drawPrivacy({ trust, consented_ms: since, left, seen_by: seen, release, trusted, can_leave: canLeave }) {
  at("left").textContent = left.length ? `${left.length} contributions` : "Nothing, so far.";
  at("left-each").replaceChildren(
    ...left.map((one) => make("li", {}, `${when(one.at_ms)}: round ${one.round}, ${one.n_bytes} bytes, ${one.sealed ? "sealed" : "not sealed"}`)),
  );
  at("seen-by").textContent = sentence(seen);
  at("agreed").textContent = AGREED[trust] + (since ? ` Said ${when(since)}.` : "");
  at("promise").textContent = release ? `${release}.` : "Nothing: it was made of exact sums, and is not private.";
  at("trusted").textContent = trusted.length ? sentence(trusted.join("; ")) : "Nothing: it checks all of the promise.";
  at("no-plan").hidden = canLeave;
  at("consent").setAttribute("aria-checked", String(trust !== "nobody"));
}

async function drawKept() {
  const kept = await get("kept");
  if (!kept) return;
  const events = kept.events.map((one) => make("li", {}, `${kept.titles[one.item]} — ${one.kind}, ${when(one.at_ms)}`)).reverse();
  const refused = kept.refused_items.map((item) => make("li", {}, allowed(item, kept.titles[item])));
  fill(at("events"), [...refused, ...events]);
  if (!at("events").children.length) at("events").append(make("li", {}, "Nothing yet."));
}

function drawReceipt({ key_destroyed: destroyed, kept, lost }) {
  at("key").textContent = destroyed ? "Destroyed: what was written with it can no longer be read by anybody." : "Still there.";
  const stays = Object.entries(kept).map(([name, value]) => `${name.replaceAll("_", " ")}: ${value}`);
  at("stays").textContent = stays.length ? `${stays.join(", ")}. Nothing of what you did.` : "Nothing.";
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
  at("n-found").textContent = `${answer.n.toLocaleString("en")} ${answer.n === 1 ? "film" : "films"}`;
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

at("language").onchange = async () => {
  const answer = await get("me", { language: at("language").value });
  if (answer) draw(answer);
};
at("consent").onclick = () => {
  const trust = at("consent").getAttribute("aria-checked") === "true" ? "nobody" : "server";
  const words = trust === "server" ? "You agreed. Withdraw here at any time." : "Withdrawn: nothing will leave this device.";
  act("agree", { trust }, () => words);
};
at("sync").onclick = async () => {
  at("synced").textContent = "Looking…";
  const { result } = (await act("sync", {})) ?? {};
  if (!result) return (at("synced").textContent = "");
  const round = result.reason ? `took part in no round: ${WHY_NO_ROUND[result.reason] ?? result.reason}` : `took part in round ${result.round}`;
  at("synced").textContent = `Model: ${RELEASE[result.release]}${result.why && `, because ${result.why}`}; version ${result.version} is in use. This device ${round}.`;
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
  if (await act("begin", {}, () => "A new start.")) at("h-list").focus();
};

at("language").value = navigator.language.startsWith("zh") ? "zh" : "en";
const [catalogue, mine] = [await get("catalogue"), await get("me", { language: at("language").value })];
if (catalogue && mine) {
  at("topics").append(...catalogue.topics.map((topic) => make("option", { value: topic }, topic)));
  at("terms").hidden = !catalogue.name.startsWith("ml-");
  draw(mine);
  browse();
}

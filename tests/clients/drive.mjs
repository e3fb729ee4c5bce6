// Drives a machine with a Machines API client that is not ours: create, wait, update, stop, start, suspend, destroy, and
// what else it can ask. Run by tests/e2e/test_foreign_client.py as `node drive.mjs URL TOKEN APP IMAGE`; prints one JSON
// document of what it was answered. The client was made from the original's description and fails on other answers.
import * as Effect from "effect/Effect";
import * as Layer from "effect/Layer";
import * as Redacted from "effect/Redacted";
import * as FetchHttpClient from "effect/unstable/http/FetchHttpClient";
import * as fly from "@distilled.cloud/fly-io";

const [url, token, app_name, image] = process.argv.slice(2);
const credentials = Layer.succeed(fly.Credentials, { apiKey: Redacted.make(token), apiBaseUrl: `${url}/v1` });
const layer = Layer.merge(credentials, FetchHttpClient.layer);
const call = (operation, input) => Effect.runPromise(operation(input).pipe(Effect.provide(layer)));
const refused = (promise) => promise.then(() => "done", (error) => `${error._tag}: ${error.message}`);
const told = {};

// Writes down the signals it hears, so that what the API says of them can be checked from inside: whoever begins anew
// has forgotten them.
const exec = ["sh", "-c", "trap 'echo again >> /tmp/heard' HUP; echo began > /tmp/heard; while :; do sleep 0.1; done"];
const config = (version) => ({ image, init: { exec }, env: { V: version } });

const machine = await call(fly.MachinesCreate, { app_name, region: "iad", config: config("1") });
const one = { app_name, machine_id: machine.id };
const wait = (state, more = {}) => call(fly.MachinesWait, { ...one, state, timeout: 60, ...more });
const inside = async (...command) => {
  const done = await call(fly.MachinesExec, { ...one, command, timeout: 10 });
  return [done.exit_code, done.stdout];
};
const processes = () => call(fly.MachinesListProcesses, { ...one, sort_by: "pid" });

told.created = [machine.state, machine.events.map((event) => event.type)];
told.waited = (await wait("started")).state;
told.listed = (await call(fly.MachinesList, { app_name })).map((found) => found.id === machine.id);
const updated = await call(fly.MachinesUpdate, { ...one, current_version: machine.instance_id, config: config("2") });
told.new_version = updated.instance_id !== machine.instance_id;
told.updated = (await wait("started", { version: updated.instance_id })).version === updated.instance_id;
told.versions = (await call(fly.MachinesListVersions, one)).map((version) => version.user_config.env.V);
told.version_inside = await inside("sh", "-c", "echo $V");
told.outdated = await refused(
  call(fly.MachinesUpdate, { ...one, current_version: machine.instance_id, config: config("3") }),
);
await call(fly.MachinesStop, { ...one, signal: "SIGTERM", timeout: "5s" });
told.stopped = (await wait("stopped", { version: updated.instance_id })).state;
await call(fly.MachinesStart, one);
told.started = (await wait("started")).state;
await call(fly.MachinesUpdateMetadata, { ...one, metadata: { role: "leader" }, machine_version: updated.instance_id });
told.metadata = await call(fly.MachinesShowMetadata, one);
await call(fly.MachinesSignal, { ...one, signal: "SIGHUP" });
told.heard = await inside("sh", "-c", "until grep again /tmp/heard; do sleep 0.1; done");
told.processes = (await processes()).filter((process) => process.command.includes("trap")).length;
await call(fly.MachinesSuspend, one);
told.suspended = (await wait("suspended")).state;
await call(fly.MachinesStart, one);
told.resumed = (await wait("started")).state;
told.kept = await inside("cat", "/tmp/heard");
told.failed = await inside("sh", "-c", "exit 3");
told.events = (await call(fly.MachinesListEvents, { ...one, limit: 3 })).length;
told.missing = await refused(call(fly.MachinesShow, { app_name, machine_id: "00000000000000" }));
told.regions = (await call(fly.PlatformRegionsGet, {})).regions.map((region) => region.code);
told.org = (await call(fly.MachinesOrgList, { org_slug: "personal" })).machines
  .filter((found) => found.app_name === app_name)
  .map((found) => found.id === machine.id);
await call(fly.MachinesStop, one);
await wait("stopped", { version: updated.instance_id });
await call(fly.MachinesDelete, one);
told.destroyed = (await wait("destroyed")).state;
told.remembered = (await call(fly.MachinesShow, one)).state;

const left = await call(fly.MachinesCreate, { app_name, config: config("1"), skip_launch: true });
const other = { app_name, machine_id: left.id };
const lease = await call(fly.MachinesCreateLease, { ...other, ttl: 30, description: "ours" });
told.lease = [lease.nonce.length > 0, (await call(fly.MachinesShowLease, other)).description];
told.held = await refused(call(fly.MachinesCordon, other));

process.stdout.write(JSON.stringify(told));

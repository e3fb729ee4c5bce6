// Drives a machine with a Machines API client that is not ours: create, wait, update, stop, start, suspend, destroy, and
// what else it can ask. Run by tests/contract/test_foreign_client.py as `node drive.mjs URL TOKEN APP IMAGE`; prints one
// JSON document of what it was answered. The client was made from the original's description and fails on other answers.
import * as Effect from "effect/Effect";
import * as Layer from "effect/Layer";
import * as Redacted from "effect/Redacted";
import * as FetchHttpClient from "effect/unstable/http/FetchHttpClient";
import * as fly from "@distilled.cloud/fly-io";

const [url, token, app_name, image] = process.argv.slice(2);
const credentials = Layer.succeed(fly.Credentials, { apiKey: Redacted.make(token), apiBaseUrl: `${url}/v1` });
const layer = Layer.merge(credentials, FetchHttpClient.layer);
const call = (operation, input) => Effect.runPromise(operation(input).pipe(Effect.provide(layer)));
const told = {};

const machine = await call(fly.MachinesCreate, { app_name, region: "iad", config: { image, env: { V: "1" } } });
const one = { app_name, machine_id: machine.id };
const wait = (state, more = {}) => call(fly.MachinesWait, { ...one, state, timeout: 60, ...more });

told.created = machine.state;
told.waited = (await wait("started")).state;
told.listed = (await call(fly.MachinesList, { app_name })).map((found) => found.id === machine.id);
const config = { image, env: { V: "2" } };
const updated = await call(fly.MachinesUpdate, { ...one, current_version: machine.instance_id, config });
told.new_version = updated.instance_id !== machine.instance_id;
told.updated = (await wait("started", { version: updated.instance_id })).version === updated.instance_id;
told.versions = (await call(fly.MachinesListVersions, one)).map((version) => version.user_config.env.V);
await call(fly.MachinesStop, { ...one, signal: "SIGTERM", timeout: "5s" });
told.stopped = (await wait("stopped", { version: updated.instance_id })).state;
await call(fly.MachinesStart, one);
told.started = (await wait("started")).state;
await call(fly.MachinesUpdateMetadata, { ...one, metadata: { role: "leader" }, machine_version: updated.instance_id });
told.metadata = await call(fly.MachinesShowMetadata, one);
told.processes = (await call(fly.MachinesListProcesses, { ...one, sort_by: "pid" })).length > 0;
told.exec = await call(fly.MachinesExec, { ...one, command: ["echo", "hello"], timeout: 10 });
await call(fly.MachinesSignal, { ...one, signal: "SIGHUP" });
await call(fly.MachinesSuspend, one);
told.suspended = (await wait("suspended")).state;
await call(fly.MachinesStart, one);
told.resumed = (await wait("started")).state;
told.events = (await call(fly.MachinesListEvents, { ...one, limit: 3 })).length;
told.missing = await call(fly.MachinesShow, { app_name, machine_id: "00000000000000" }).then(
  () => "there",
  (error) => `${error._tag}: ${error.message}`,
);
told.regions = (await call(fly.PlatformRegionsGet, {})).regions.map((region) => region.code);
told.org = (await call(fly.MachinesOrgList, { org_slug: "personal" })).machines.map((found) => found.id === machine.id);
await call(fly.MachinesStop, one);
await wait("stopped", { version: updated.instance_id });
await call(fly.MachinesDelete, one);
told.destroyed = (await wait("destroyed")).state;

const other = { app_name, machine_id: (await call(fly.MachinesCreate, { app_name, config: { image } })).id };
const lease = await call(fly.MachinesCreateLease, { ...other, ttl: 30, description: "ours" });
told.lease = [lease.nonce.length > 0, (await call(fly.MachinesShowLease, other)).description];
told.held = await call(fly.MachinesCordon, other).then(() => "done", (error) => error.message);

process.stdout.write(JSON.stringify(told));

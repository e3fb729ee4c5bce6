//! The last three routing views on disk, so that serving goes on without an agent, and a way back when the newest one kills
//! the proxy: after two crashes within a minute the one before is loaded and rows that differ are set aside.
//!
//! The files hold private keys of certificates: mode 0600.

use std::collections::HashSet;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use imbl::OrdMap;
use pantala_route::table::{RowKey, Table};
use pantala_wire::feed::FeedRow;
use serde::{Deserialize, Serialize};

use crate::log::{self, now_ms};

const KEPT: usize = 3;
const CRASH_WINDOW_MS: u64 = 60_000;
const CRASHES_MAX: usize = 2;

#[derive(Serialize, Deserialize)]
struct Saved {
    revision: u64,
    rows: Vec<FeedRow>,
}

/// Starts that did not end in order, newest last. The file exists while a proxy runs.
#[derive(Default, Serialize, Deserialize)]
struct Marker {
    started_ms: u64,
    crashed_ms: Vec<u64>,
}

pub struct Generations {
    dir: PathBuf,
}

impl Generations {
    pub fn open(dir: &Path) -> io::Result<Generations> {
        fs::create_dir_all(dir)?;
        Ok(Generations { dir: dir.to_owned() })
    }

    fn path(&self, generation: usize) -> PathBuf {
        self.dir.join(format!("snapshot-{generation}.json"))
    }

    fn marker(&self) -> PathBuf {
        self.dir.join("running.json")
    }

    /// Fills the table and leaves the mark that only an orderly end removes.
    /// `replacing`: the mark that is there is that of a process which still runs.
    pub fn load(&self, table: &mut Table, replacing: bool) -> io::Result<()> {
        let crashes = self.begin(replacing)?;
        let newest = self.read(0);
        if crashes < CRASHES_MAX {
            if let Some(saved) = newest.or_else(|| self.read(1)).or_else(|| self.read(2)) {
                table.replace(saved.revision, saved.rows);
            }
            return Ok(());
        }
        let base = self.read(1).or_else(|| self.read(2)).unwrap_or(Saved {
            revision: 0,
            rows: Vec::new(),
        });
        let known: HashSet<_> = base.rows.iter().map(parts).collect();
        let newest = newest.map(|saved| saved.rows).unwrap_or_default();
        let mut suspects = 0;
        for row in newest.iter().filter(|row| !known.contains(&parts(row))) {
            if let Some(value) = &row.value {
                suspects += 1;
                table.quarantine(
                    (row.stream.as_str().into(), row.key.as_str().into()),
                    value.as_str().into(),
                );
            }
        }
        log::error(
            "two crashes within a minute",
            &[("loaded_revision", &base.revision), ("set_aside", &suspects)],
        );
        table.replace(base.revision, base.rows);
        Ok(())
    }

    /// Crashes within the window, the last one included.
    fn begin(&self, replacing: bool) -> io::Result<usize> {
        let now = now_ms();
        let previous: Option<Marker> = fs::read(self.marker())
            .ok()
            .map(|text| serde_json::from_slice(&text).unwrap_or_default());
        let mut crashed: Vec<u64> = previous
            .into_iter()
            .flat_map(|marker| [marker.crashed_ms, if replacing { vec![] } else { vec![now] }].concat())
            .collect();
        crashed.retain(|at| now.saturating_sub(*at) <= CRASH_WINDOW_MS);
        let crashes = crashed.len();
        let text = serde_json::to_vec(&Marker {
            started_ms: now,
            crashed_ms: crashed,
        })?;
        replace_file(&self.marker(), |file| file.write_all(&text))?;
        Ok(crashes)
    }

    pub fn end_in_order(&self) {
        if let Err(error) = fs::remove_file(self.marker()) {
            log::warning("mark of a running proxy not removed", &[("reason", &error)]);
        }
    }

    fn read(&self, generation: usize) -> Option<Saved> {
        let text = fs::read(self.path(generation)).ok()?;
        let saved = serde_json::from_slice(&text);
        if let Err(error) = &saved {
            // The message of serde may quote a value; a key is among them.
            log::error(
                "snapshot not readable",
                &[("generation", &generation), ("line", &error.line())],
            );
        }
        saved.ok()
    }

    /// The view becomes the newest generation.
    pub fn save(&self, revision: u64, rows: &OrdMap<RowKey, Arc<str>>) -> io::Result<()> {
        for older in (0..KEPT - 1).rev() {
            match fs::rename(self.path(older), self.path(older + 1)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        replace_file(&self.path(0), |file| write_document(file, revision, rows))
    }
}

/// What makes two rows the same.
fn parts(row: &FeedRow) -> (&str, &str, Option<&str>) {
    (&row.stream, &row.key, row.value.as_ref().map(|value| value.as_str()))
}

/// Values are written as they came; stream and key by serde.
fn write_document(file: &mut impl Write, revision: u64, rows: &OrdMap<RowKey, Arc<str>>) -> io::Result<()> {
    write!(file, "{{\"revision\":{revision},\"rows\":[")?;
    let mut comma = "";
    for ((stream, key), value) in rows {
        let (stream, key) = (serde_json::to_string(&**stream)?, serde_json::to_string(&**key)?);
        write!(file, "{comma}\n{{\"stream\":{stream},\"key\":{key},\"value\":{value}}}")?;
        comma = ",";
    }
    file.write_all(b"\n]}\n")
}

fn replace_file(path: &Path, write: impl FnOnce(&mut BufWriter<File>) -> io::Result<()>) -> io::Result<()> {
    let new = path.with_extension("new");
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&new)?;
    let mut buffered = BufWriter::new(file);
    write(&mut buffered)?;
    buffered.into_inner()?.sync_all()?;
    fs::rename(&new, path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn row(name: &str) -> FeedRow {
        let value = json!({"app": name, "org": "o", "network": 1});
        FeedRow {
            stream: "routes".into(),
            key: format!("app/{name}"),
            value: Some((&value).into()),
        }
    }

    fn names(table: &Table) -> Vec<String> {
        let mut names: Vec<String> = table.snapshot().apps.keys().map(|n| n.to_string()).collect();
        names.sort();
        names
    }

    #[test]
    fn the_one_before_after_two_crashes() {
        let dir = std::env::temp_dir().join(format!("pantala-generations-{}", std::process::id()));
        let generations = Generations::open(&dir).unwrap();
        let mut table = Table::new("n1");
        generations.load(&mut table, false).unwrap();
        table.replace(1, vec![row("good")]);
        generations.save(1, &table.rows()).unwrap();
        table.replace(2, vec![row("good"), row("poison")]);
        generations.save(2, &table.rows()).unwrap();

        let mut second = Table::new("n1");
        generations.load(&mut second, false).unwrap(); // one crash: the newest
        assert_eq!(names(&second), ["good", "poison"]);
        let mut third = Table::new("n1");
        generations.load(&mut third, false).unwrap(); // two
        assert_eq!(names(&third), ["good"]);
        third.replace(3, vec![row("good"), row("poison"), row("new")]);
        assert_eq!(names(&third), ["good", "new"]);
        assert_eq!(
            third.set_aside().map(|(key, _)| key).collect::<Vec<_>>(),
            ["app/poison"]
        );

        generations.end_in_order();
        let mut fourth = Table::new("n1");
        generations.load(&mut fourth, false).unwrap();
        assert_eq!(names(&fourth), ["good", "poison"]);
        fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn keys_are_not_for_others() {
        use std::os::unix::fs::PermissionsExt;
        let dir = std::env::temp_dir().join(format!("pantala-mode-{}", std::process::id()));
        let generations = Generations::open(&dir).unwrap();
        generations.save(1, &OrdMap::new()).unwrap();
        assert_eq!(
            fs::metadata(generations.path(0)).unwrap().permissions().mode() & 0o777,
            0o600
        );
        fs::remove_dir_all(&dir).unwrap();
    }
}

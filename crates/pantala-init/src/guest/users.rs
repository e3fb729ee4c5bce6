//! Who the app runs as: `user` of an image or a config, looked up in the image's own `/etc/passwd` and `/etc/group`.
//!
//! Rules of the OCI image config as the common runtimes follow them: `user`, `uid`, `user:group`, `uid:gid` and mixtures;
//! a number needs no entry; without a group the entry's own group counts, else 0, and supplementary groups come
//! from `/etc/group`, which an explicit group switches off.

/// Ids inside a machine are mapped up to here.
const ID_MAX: u32 = 65_535;

#[derive(Debug, PartialEq, Eq)]
pub struct Identity {
    pub uid: u32,
    pub gid: u32,
    pub groups: Vec<u32>,
    pub home: String,
}

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum UserError {
    #[error("there is no user {0:?} in the image's /etc/passwd")]
    NoUser(String),
    #[error("there is no group {0:?} in the image's /etc/group")]
    NoGroup(String),
    #[error("the id {0} is outside of 0 to {ID_MAX}")]
    OutOfRange(String),
}

struct Account<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
}

struct Group<'a> {
    name: &'a str,
    gid: u32,
    members: Vec<&'a str>,
}

/// `user` empty is root. Lines of the two files that cannot be read are skipped, as the C library does.
pub fn identify(user: &str, passwd: &str, group: &str) -> Result<Identity, UserError> {
    let accounts: Vec<Account> = passwd.lines().filter_map(account).collect();
    let groups: Vec<Group> = group.lines().filter_map(group_line).collect();
    let (user_part, group_part) = match user.split_once(':') {
        Some((user_part, group_part)) => (user_part, Some(group_part).filter(|part| !part.is_empty())),
        None => (user, None),
    };
    let user_part = if user_part.is_empty() { "0" } else { user_part };

    let by_name = accounts.iter().find(|a| a.name == user_part);
    let (account, uid) = match by_name {
        Some(account) => (Some(account), account.uid),
        None if is_number(user_part) => {
            let uid = number(user_part)?;
            (accounts.iter().find(|a| a.uid == uid), uid)
        }
        None => return Err(UserError::NoUser(user_part.to_owned())),
    };
    let mut supplementary = Vec::new();
    let gid = match group_part {
        Some(part) => match groups.iter().find(|g| g.name == part) {
            Some(group) => group.gid,
            None if is_number(part) => number(part)?,
            None => return Err(UserError::NoGroup(part.to_owned())),
        },
        None => {
            if let Some(account) = account {
                supplementary = groups
                    .iter()
                    .filter(|g| g.members.contains(&account.name))
                    .map(|g| g.gid)
                    .collect();
            }
            account.map_or(0, |a| a.gid)
        }
    };
    if uid > ID_MAX || gid > ID_MAX {
        return Err(UserError::OutOfRange(uid.max(gid).to_string()));
    }
    supplementary.retain(|&id| id <= ID_MAX && id != gid);
    supplementary.sort_unstable();
    supplementary.dedup();
    let fallback = if uid == 0 { "/root" } else { "/" };
    let home = account
        .map(|a| a.home)
        .filter(|home| !home.is_empty())
        .unwrap_or(fallback)
        .to_owned();
    Ok(Identity {
        uid,
        gid,
        groups: supplementary,
        home,
    })
}

fn is_number(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())
}

fn number(text: &str) -> Result<u32, UserError> {
    text.parse()
        .ok()
        .filter(|&id| id <= ID_MAX)
        .ok_or_else(|| UserError::OutOfRange(text.to_owned()))
}

fn account(line: &str) -> Option<Account<'_>> {
    let fields: Vec<&str> = line.split(':').collect();
    let [name, _, uid, gid, _, home, ..] = fields[..] else {
        return None;
    };
    Some(Account {
        name,
        uid: uid.parse().ok()?,
        gid: gid.parse().ok()?,
        home,
    })
}

fn group_line(line: &str) -> Option<Group<'_>> {
    let fields: Vec<&str> = line.split(':').collect();
    let [name, _, gid, members, ..] = fields[..] else {
        return None;
    };
    Some(Group {
        name,
        gid: gid.parse().ok()?,
        members: members.split(',').map(str::trim).collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str =
        "root:x:0:0:root:/root:/bin/sh\nbroken\napp:x:1000:1001:App:/srv/app:/bin/sh\n1234:x:7:8::/n:\n";
    const GROUP: &str = "root:x:0:\napp:x:1001:\nvideo:x:44:app,other\naudio:x:29:other, app\n";

    fn ids(user: &str) -> (u32, u32, Vec<u32>) {
        let identity = identify(user, PASSWD, GROUP).unwrap();
        (identity.uid, identity.gid, identity.groups)
    }

    #[test]
    fn names_numbers_and_groups() {
        assert_eq!(ids(""), (0, 0, vec![]));
        assert_eq!(ids("app"), (1000, 1001, vec![29, 44]));
        assert_eq!(ids("1000"), (1000, 1001, vec![29, 44]));
        assert_eq!(ids("app:video"), (1000, 44, vec![]));
        assert_eq!(ids("app:5"), (1000, 5, vec![]));
        assert_eq!(ids("4711"), (4711, 0, vec![]));
        assert_eq!(ids(":video"), (0, 44, vec![]));
        assert_eq!(ids("app:"), (1000, 1001, vec![29, 44]));
    }

    #[test]
    fn a_name_of_digits_wins_over_the_number() {
        assert_eq!(ids("1234"), (7, 8, vec![]));
    }

    #[test]
    fn homes() {
        let home = |user| identify(user, PASSWD, GROUP).unwrap().home;
        assert_eq!(home("app"), "/srv/app");
        assert_eq!(home("4711"), "/");
        assert_eq!(identify("", "", "").unwrap().home, "/root");
    }

    #[test]
    fn who_does_not_exist_is_named() {
        let error = |user| identify(user, PASSWD, GROUP).unwrap_err();
        assert_eq!(error("nobody"), UserError::NoUser("nobody".into()));
        assert_eq!(error("app:staff"), UserError::NoGroup("staff".into()));
        assert_eq!(error("70000"), UserError::OutOfRange("70000".into()));
        assert_eq!(error("0:99999999999"), UserError::OutOfRange("99999999999".into()));
    }
}

//! May this certificate log in? Pure but for the moment that it is asked at.

use pantala_wire::guest::Ssh;
use russh::keys::ssh_key::certificate::CertType;
use russh::keys::ssh_key::public::KeyData;
use russh::keys::{Algorithm, Certificate, PublicKey};

const FORCE_COMMAND: &str = "force-command";
/// What a certificate of the control plane's may live.
const LIVES_S_MAX: u64 = 73 * 3600;

/// Whom a machine lets in.
pub struct Policy {
    authorities: Vec<KeyData>,
    scopes: Vec<String>,
}

/// What somebody may do who is in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Permits {
    pub terminal: bool,
    pub forwarding: bool,
    /// The only thing that it may run.
    pub command: Option<String>,
}

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error("it is not for users")]
    NotForUsers,
    #[error("its key is not ed25519")]
    OtherKey,
    #[error("no authority of this machine signed it")]
    UnknownAuthority,
    #[error("its signature is wrong")]
    Forged,
    #[error("it is not valid now")]
    NotNow,
    #[error("it is valid for too long")]
    TooLong,
    #[error("it does not permit {0} here")]
    NotHere(String),
    #[error("its critical option {0} is not known here")]
    UnknownOption(String),
}

impl Policy {
    pub fn read(ssh: &Ssh) -> Result<Self, russh::keys::ssh_key::Error> {
        let authorities = ssh
            .authorities
            .iter()
            .map(|text| Ok(PublicKey::from_openssh(text)?.key_data().clone()))
            .collect::<Result<_, russh::keys::ssh_key::Error>>()?;
        Ok(Policy {
            authorities,
            scopes: ssh.principals.clone(),
        })
    }

    /// `login` is the user that is asked for. That the visitor has the certificate's key, the caller has checked.
    pub fn check(&self, certificate: &Certificate, login: &str, now_s: u64) -> Result<Permits, Refusal> {
        if certificate.cert_type() != CertType::User {
            return Err(Refusal::NotForUsers);
        }
        if certificate.algorithm() != Algorithm::Ed25519 {
            return Err(Refusal::OtherKey);
        }
        if !self.authorities.contains(certificate.signature_key()) {
            return Err(Refusal::UnknownAuthority);
        }
        certificate.verify_signature().map_err(|_| Refusal::Forged)?;
        let (after_s, before_s) = (certificate.valid_after(), certificate.valid_before());
        if now_s < after_s || now_s >= before_s {
            return Err(Refusal::NotNow);
        }
        if before_s - after_s > LIVES_S_MAX {
            return Err(Refusal::TooLong);
        }
        // No principals means anybody in OpenSSH's words, nobody in ours.
        let here = |scope: &String| {
            let wanted = format!("{login}@{scope}");
            certificate.valid_principals().contains(&wanted)
        };
        if !self.scopes.iter().any(here) {
            return Err(Refusal::NotHere(login.to_owned()));
        }
        let options = certificate.critical_options();
        if let Some(unknown) = options.keys().find(|name| *name != FORCE_COMMAND) {
            return Err(Refusal::UnknownOption(unknown.clone()));
        }
        let extensions = certificate.extensions();
        Ok(Permits {
            terminal: extensions.contains_key("permit-pty"),
            forwarding: extensions.contains_key("permit-port-forwarding"),
            command: options.get(FORCE_COMMAND).cloned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use russh::keys::PrivateKey;
    use russh::keys::ssh_key::certificate::Builder;
    use russh::keys::ssh_key::private::{Ed25519Keypair, KeypairData};

    const NOW: u64 = 1_800_000_000;

    fn key(seed: u8) -> PrivateKey {
        PrivateKey::new(KeypairData::from(Ed25519Keypair::from_seed(&[seed; 32])), "").unwrap()
    }

    fn policy() -> Policy {
        Policy {
            authorities: vec![
                key(1).public_key().key_data().clone(),
                key(2).public_key().key_data().clone(),
            ],
            scopes: vec!["acme/web".to_owned()],
        }
    }

    fn made(authority: u8, change: impl FnOnce(&mut Builder)) -> Certificate {
        let mut builder = Builder::new([7; 16], key(9).public_key().key_data().clone(), NOW - 60, NOW + 3600).unwrap();
        change(&mut builder);
        builder.sign(&key(authority)).unwrap()
    }

    fn principal(name: &str) -> impl FnOnce(&mut Builder) + '_ {
        move |builder| {
            builder.cert_type(CertType::User).unwrap();
            builder.valid_principal(name).unwrap();
        }
    }

    #[test]
    fn each_authority_is_believed_and_no_other() {
        for authority in [1, 2] {
            let found = policy().check(&made(authority, principal("root@acme/web")), "root", NOW);
            let nothing = Permits {
                terminal: false,
                forwarding: false,
                command: None,
            };
            assert_eq!(found, Ok(nothing));
        }
        let other = policy().check(&made(3, principal("root@acme/web")), "root", NOW);
        assert_eq!(other, Err(Refusal::UnknownAuthority));
    }

    #[test]
    fn it_counts_only_in_its_time() {
        let certificate = made(1, principal("root@acme/web"));
        for (now_s, good) in [
            (NOW - 61, false),
            (NOW - 60, true),
            (NOW + 3599, true),
            (NOW + 3600, false),
        ] {
            assert_eq!(policy().check(&certificate, "root", now_s).is_ok(), good, "{now_s}");
        }
    }

    #[test]
    fn it_counts_for_its_app_and_its_user_only() {
        for (name, login) in [
            ("root@acme/other", "root"),
            ("root@evil/web", "root"),
            ("app@acme/web", "root"),
            ("root", "root"),
            ("acme/web", "root"),
            ("root@acme/web", "app"),
        ] {
            let found = policy().check(&made(1, principal(name)), login, NOW);
            assert_eq!(found, Err(Refusal::NotHere(login.to_owned())), "{name} {login}");
        }
        let anybody = made(1, |builder| {
            builder.cert_type(CertType::User).unwrap();
            builder.all_principals_valid().unwrap();
        });
        assert_eq!(
            policy().check(&anybody, "root", NOW),
            Err(Refusal::NotHere("root".to_owned()))
        );
    }

    #[test]
    fn options_are_honoured_or_it_is_refused() {
        let forced = made(1, |builder| {
            principal("root@acme/web")(builder);
            builder.critical_option(FORCE_COMMAND, "/bin/date").unwrap();
            builder.extension("permit-pty", "").unwrap();
        });
        let permits = policy().check(&forced, "root", NOW).unwrap();
        assert_eq!(
            (permits.command.as_deref(), permits.terminal),
            (Some("/bin/date"), true)
        );
        let unknown = made(1, |builder| {
            principal("root@acme/web")(builder);
            builder.critical_option("source-address", "10.0.0.0/8").unwrap();
        });
        let refused = Refusal::UnknownOption("source-address".to_owned());
        assert_eq!(policy().check(&unknown, "root", NOW), Err(refused));
    }

    #[test]
    fn a_host_certificate_logs_nobody_in() {
        let host = made(1, |builder| {
            builder.cert_type(CertType::Host).unwrap();
            builder.valid_principal("root@acme/web").unwrap();
        });
        assert_eq!(policy().check(&host, "root", NOW), Err(Refusal::NotForUsers));
    }
}

//! What is answered here and what is asked elsewhere. Pure. Answers hold only the type asked for.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;

use hickory_proto::op::{Message, MessageType, OpCode, ResponseCode};
use hickory_proto::rr::rdata::{A, AAAA, TXT};
use hickory_proto::rr::{DNSClass, Name, RData, Record, RecordType};
use imbl::HashMap;
use pantala_route::internal::{Network, Records, Wanted};

const TTL_S: u32 = 5;
/// A text is one record of strings this long.
const TEXT_PIECE: usize = 255;
/// The resolver of every machine, and the door to the API.
const API: Ipv6Addr = Ipv6Addr::new(0xfdaa, 0, 0, 0, 0, 0, 0, 3);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Zone {
    /// `.internal` and, forwarded, everything public
    Machines,
    /// the box's own names and nothing else
    Public,
}

#[derive(Debug, PartialEq, Eq)]
pub enum Decision {
    Answer(Vec<u8>),
    Forward,
}

/// What the world may ask about.
#[derive(Clone, Copy)]
pub struct Public<'a> {
    /// suffix to the edges' address
    pub names: &'a [(String, IpAddr)],
    pub texts: &'a BTreeMap<String, Vec<String>>,
    /// `<app>.<app_domain>` leads to the app's own addresses where it has some
    pub app_domain: &'a str,
    pub own_addresses: &'a HashMap<Arc<str>, Arc<[IpAddr]>>,
}

impl Public<'_> {
    fn addresses(&self, name: &str, wanted: RecordType) -> Option<Vec<RData>> {
        let (_, edge) = self
            .names
            .iter()
            .filter(|(suffix, _)| under(name, suffix))
            .max_by_key(|(suffix, _)| suffix.len())?;
        let app = name
            .strip_suffix(self.app_domain)
            .and_then(|rest| rest.strip_suffix('.'));
        let own = app.and_then(|app| self.own_addresses.get(app));
        let found: Vec<RData> = own
            .into_iter()
            .flat_map(|all| all.iter())
            .flat_map(|ip| data(wanted, *ip))
            .collect();
        Some(if found.is_empty() { data(wanted, *edge) } else { found })
    }
}

/// Nothing for what is no query. `network`: that of the asker, none for one outside the private network.
pub fn decide(zone: Zone, query: &Message, public: Public<'_>, network: Option<&Network<'_>>) -> Option<Decision> {
    if query.message_type() != MessageType::Query {
        return None;
    }
    let refuse = |code| reply(query, code, Vec::new()).map(Decision::Answer);
    if query.op_code() != OpCode::Query {
        return refuse(ResponseCode::NotImp);
    }
    let [question] = query.queries() else {
        return refuse(ResponseCode::FormErr);
    };
    if question.query_class() != DNSClass::IN {
        return refuse(ResponseCode::Refused);
    }
    let name = question.name().to_lowercase().to_ascii();
    let name = name.trim_end_matches('.');
    let wanted = question.query_type();
    if wanted == RecordType::TXT
        && let Some(values) = public.texts.get(name)
    {
        let records = values.iter().map(|value| text(value)).collect();
        return reply(query, ResponseCode::NoError, records).map(Decision::Answer);
    }
    if let Some(records) = public.addresses(name, wanted) {
        return reply(query, ResponseCode::NoError, records).map(Decision::Answer);
    }
    match zone {
        Zone::Public => refuse(ResponseCode::Refused),
        Zone::Machines if name == "_api.internal" => {
            reply(query, ResponseCode::NoError, data(wanted, API.into())).map(Decision::Answer)
        }
        Zone::Machines if name == "internal" || name == "flycast" => refuse(ResponseCode::NoError),
        // Private names never leave the host.
        Zone::Machines if under(name, "internal") => {
            let known = network.and_then(|network| network.answer(name.strip_suffix(".internal")?, kind(wanted)));
            match known {
                Some(records) => reply(query, ResponseCode::NoError, rdata(records)).map(Decision::Answer),
                None => refuse(ResponseCode::NXDomain),
            }
        }
        // The name of an app's Flycast address: it exists with the app, and is empty as long as there is no address.
        Zone::Machines if under(name, "flycast") => {
            let known = network.and_then(|network| network.flycast(name.strip_suffix(".flycast")?, kind(wanted)));
            match known {
                Some(records) => reply(query, ResponseCode::NoError, rdata(records)).map(Decision::Answer),
                None => refuse(ResponseCode::NXDomain),
            }
        }
        Zone::Machines => Some(Decision::Forward),
    }
}

fn under(name: &str, suffix: &str) -> bool {
    name.strip_suffix(suffix)
        .is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

fn kind(wanted: RecordType) -> Wanted {
    match wanted {
        RecordType::AAAA => Wanted::Addresses,
        RecordType::TXT => Wanted::Text,
        _ => Wanted::Other,
    }
}

fn rdata(records: Records) -> Vec<RData> {
    match records {
        Records::Addresses(all) => all.into_iter().map(|ip| RData::AAAA(AAAA(ip))).collect(),
        Records::Text(text) if text.is_empty() => Vec::new(),
        Records::Text(whole) => vec![text(&whole)],
    }
}

fn text(whole: &str) -> RData {
    RData::TXT(TXT::from_bytes(whole.as_bytes().chunks(TEXT_PIECE).collect()))
}

fn data(wanted: RecordType, address: IpAddr) -> Vec<RData> {
    match (wanted, address) {
        (RecordType::A, IpAddr::V4(ip)) => vec![RData::A(A(ip))],
        (RecordType::AAAA, IpAddr::V6(ip)) => vec![RData::AAAA(AAAA(ip))],
        _ => Vec::new(),
    }
}

fn reply(query: &Message, code: ResponseCode, data: Vec<RData>) -> Option<Vec<u8>> {
    let mut reply = Message::new();
    reply
        .set_id(query.id())
        .set_message_type(MessageType::Response)
        .set_op_code(query.op_code())
        .set_recursion_desired(query.recursion_desired())
        .set_recursion_available(true)
        .set_authoritative(!data.is_empty())
        .set_response_code(code)
        .add_queries(query.queries().iter().cloned());
    if let Some(question) = query.queries().first() {
        for data in data {
            reply.add_answer(Record::from_rdata(Name::clone(question.name()), TTL_S, data));
        }
    }
    reply.to_vec().ok()
}

/// The same query back with a code, for what we do not look at further.
pub fn refusal(query: &[u8], code: ResponseCode) -> Option<Vec<u8>> {
    let query = Message::from_vec(query)
        .ok()
        .filter(|query| query.message_type() == MessageType::Query)?;
    reply(&query, code, Vec::new())
}

/// "Ask again over TCP."
pub fn truncated(query: &[u8]) -> Option<Vec<u8>> {
    let mut answer = refusal(query, ResponseCode::NoError)?;
    *answer.get_mut(2)? |= 0x02;
    Some(answer)
}

/// What the asker says it can take over UDP; 0 without EDNS.
pub fn udp_bytes(query: &[u8]) -> u16 {
    Message::from_vec(query).map_or(0, |query| {
        query.extensions().as_ref().map_or(0, |edns| edns.max_payload())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use hickory_proto::op::Query;
    use std::str::FromStr;

    fn asked(zone: Zone, name: &str, kind: RecordType) -> Option<Message> {
        let mut query = Message::new();
        query
            .set_id(7)
            .add_query(Query::query(Name::from_str(name).unwrap(), kind));
        let names = [("apps.test".to_owned(), "10.0.0.1".parse().unwrap())];
        let texts = BTreeMap::from([(
            "_acme-challenge.www.acme.apps.test".to_owned(),
            vec!["one".to_owned(), "two".to_owned()],
        )]);
        let own = ["192.0.2.1", "192.0.2.2", "2001:db8::1"].map(|ip| ip.parse().unwrap());
        let public = Public {
            names: &names,
            texts: &texts,
            app_domain: "apps.test",
            own_addresses: &HashMap::from_iter([("own".into(), own.into()), ("six".into(), [own[2]].into())]),
        };
        match decide(zone, &query, public, None).unwrap() {
            Decision::Answer(answer) => Some(Message::from_vec(&answer).unwrap()),
            Decision::Forward => None,
        }
    }

    fn code(zone: Zone, name: &str, kind: RecordType) -> (ResponseCode, usize) {
        let answer = asked(zone, name, kind).unwrap();
        assert_eq!(answer.id(), 7);
        (answer.response_code(), answer.answers().len())
    }

    #[test]
    fn private_names() {
        use RecordType as T;
        use ResponseCode as C;
        for (name, kind, wanted) in [
            ("_api.internal.", T::AAAA, (C::NoError, 1)),
            ("_API.Internal.", T::AAAA, (C::NoError, 1)),
            ("_api.internal.", T::A, (C::NoError, 0)),
            ("web.internal.", T::AAAA, (C::NXDomain, 0)),
            ("web.flycast.", T::AAAA, (C::NXDomain, 0)),
            ("internal.", T::AAAA, (C::NoError, 0)),
            ("web.apps.test.", T::A, (C::NoError, 1)),
        ] {
            assert_eq!(code(Zone::Machines, name, kind), wanted, "{name} {kind}");
        }
        assert!(asked(Zone::Machines, "example.com.", T::A).is_none(), "forwarded");
        assert!(asked(Zone::Machines, "notinternal.", T::A).is_none(), "forwarded");
        let answer = asked(Zone::Machines, "_api.internal.", T::AAAA).unwrap();
        assert_eq!(
            (answer.answers()[0].ttl(), answer.answers()[0].data()),
            (5, &RData::AAAA(AAAA(API)))
        );
    }

    #[test]
    fn public_names_and_nothing_else() {
        use RecordType as T;
        use ResponseCode as C;
        for (name, kind, wanted) in [
            ("apps.test.", T::A, (C::NoError, 1)),
            ("Web.apps.test.", T::A, (C::NoError, 1)),
            ("web.apps.test.", T::AAAA, (C::NoError, 0)),
            ("own.apps.test.", T::A, (C::NoError, 2)),
            ("Own.apps.test.", T::AAAA, (C::NoError, 1)),
            ("a.own.apps.test.", T::A, (C::NoError, 1)),
            ("six.apps.test.", T::A, (C::NoError, 1)),
            ("six.apps.test.", T::AAAA, (C::NoError, 1)),
            ("webapps.test.", T::A, (C::Refused, 0)),
            ("_acme-challenge.WWW.acme.apps.test.", T::TXT, (C::NoError, 2)),
            ("www.acme.apps.test.", T::TXT, (C::NoError, 0)),
            ("_api.internal.", T::AAAA, (C::Refused, 0)),
            ("example.com.", T::A, (C::Refused, 0)),
        ] {
            assert_eq!(code(Zone::Public, name, kind), wanted, "{name} {kind}");
        }
    }

    #[test]
    fn answers_are_not_answered() {
        let mut response = Message::new();
        response.set_message_type(MessageType::Response);
        let nothing = Public {
            names: &[],
            texts: &BTreeMap::new(),
            app_domain: "",
            own_addresses: &HashMap::new(),
        };
        assert!(decide(Zone::Machines, &response, nothing, None).is_none());
        assert!(refusal(&response.to_vec().unwrap(), ResponseCode::Refused).is_none());
    }
}

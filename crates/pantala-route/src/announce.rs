//! The PROXY protocol, versions 1 and 2: what an app with the `proxy_proto` handler reads before its client's first byte.
//! Source: the protocol's own text (haproxy.org, proxy-protocol.txt), sections 2.1 and 2.2.

use std::net::{IpAddr, SocketAddr};

use crate::entry::Announce;

const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";
/// version 2, the connection of somebody else
const PROXIED: u8 = 0x21;
const TCP_OVER_4: u8 = 0x11;
const TCP_OVER_6: u8 = 0x21;

pub fn header(announce: Announce, client: SocketAddr, server: SocketAddr) -> Vec<u8> {
    let (from, to) = alike(client.ip().to_canonical(), server.ip().to_canonical());
    match announce {
        Announce::Text => {
            let family = if from.is_ipv4() { "TCP4" } else { "TCP6" };
            format!("PROXY {family} {from} {to} {} {}\r\n", client.port(), server.port()).into_bytes()
        }
        Announce::Binary => {
            let mut bytes = SIGNATURE.to_vec();
            bytes.extend([PROXIED, if from.is_ipv4() { TCP_OVER_4 } else { TCP_OVER_6 }]);
            let mut addresses = Vec::with_capacity(36);
            for ip in [from, to] {
                match ip {
                    IpAddr::V4(ip) => addresses.extend(ip.octets()),
                    IpAddr::V6(ip) => addresses.extend(ip.octets()),
                }
            }
            addresses.extend(client.port().to_be_bytes());
            addresses.extend(server.port().to_be_bytes());
            bytes.extend((addresses.len() as u16).to_be_bytes());
            bytes.extend(addresses);
            bytes
        }
    }
}

/// A header holds two addresses of one family.
fn alike(one: IpAddr, other: IpAddr) -> (IpAddr, IpAddr) {
    let wide = |ip: IpAddr| match ip {
        IpAddr::V4(ip) => IpAddr::V6(ip.to_ipv6_mapped()),
        IpAddr::V6(_) => ip,
    };
    if one.is_ipv4() == other.is_ipv4() {
        (one, other)
    } else {
        (wide(one), wide(other))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(announce: Announce, client: &str, server: &str) -> Vec<u8> {
        header(announce, client.parse().unwrap(), server.parse().unwrap())
    }

    #[test]
    fn text() {
        for (client, server, wanted) in [
            (
                "192.0.2.7:5000",
                "198.51.100.1:443",
                "PROXY TCP4 192.0.2.7 198.51.100.1 5000 443\r\n",
            ),
            (
                "[2001:db8::1]:1",
                "[2001:db8::2]:2",
                "PROXY TCP6 2001:db8::1 2001:db8::2 1 2\r\n",
            ),
            (
                "[::ffff:192.0.2.7]:1",
                "192.0.2.8:2",
                "PROXY TCP4 192.0.2.7 192.0.2.8 1 2\r\n",
            ),
            (
                "192.0.2.7:1",
                "[2001:db8::2]:2",
                "PROXY TCP6 ::ffff:192.0.2.7 2001:db8::2 1 2\r\n",
            ),
        ] {
            assert_eq!(String::from_utf8(of(Announce::Text, client, server)).unwrap(), wanted);
        }
    }

    #[test]
    fn binary() {
        let wanted = b"\x0d\x0a\x0d\x0a\x00\x0d\x0a\x51\x55\x49\x54\x0a\x21\x11\x00\x0c\xc0\x00\x02\x07\xc6\x33\x64\x01\x13\x88\x01\xbb";
        assert_eq!(of(Announce::Binary, "192.0.2.7:5000", "198.51.100.1:443"), wanted);
        let six = of(Announce::Binary, "[2001:db8::1]:1", "[2001:db8::2]:2");
        assert_eq!((&six[12..16], six.len()), (&b"\x21\x21\x00\x24"[..], 16 + 36));
        assert_eq!(&six[48..], b"\x00\x01\x00\x02");
    }
}

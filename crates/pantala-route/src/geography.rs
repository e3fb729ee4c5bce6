//! Names for several regions at once (Fly.io: region aliases in replays and routing headers). The documentation gives the
//! names only; who belongs to them follows from geography. A region that an operator named himself is in `any` alone.

const APAC: [&str; 5] = ["bom", "hkg", "nrt", "sin", "syd"];
const EU: [&str; 8] = ["ams", "arn", "cdg", "fra", "lhr", "mad", "otp", "waw"];
const US: [&str; 12] = [
    "atl", "bos", "den", "dfw", "ewr", "iad", "lax", "mia", "ord", "phx", "sea", "sjc",
];
const NA_BESIDE_US: [&str; 4] = ["gdl", "qro", "yul", "yyz"];
const SA: [&str; 5] = ["bog", "eze", "gig", "gru", "scl"];

/// `wanted`, a region's code or an alias in lower case, includes `region`.
pub fn includes(wanted: &str, region: &str) -> bool {
    match wanted {
        _ if wanted == region => true,
        "any" => true,
        "apac" => APAC.contains(&region),
        "eu" => EU.contains(&region),
        "us" | "usa" => US.contains(&region),
        "na" => US.contains(&region) || NA_BESIDE_US.contains(&region),
        "sa" => SA.contains(&region),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn aliases_by_geography() {
        for (wanted, inside, outside) in [
            ("iad", "iad", "ord"),
            ("any", "jnb", ""),
            ("apac", "nrt", "iad"),
            ("eu", "waw", "iad"),
            ("us", "sjc", "yyz"),
            ("usa", "iad", "gru"),
            ("na", "yyz", "gru"),
            ("na", "iad", "lhr"),
            ("sa", "scl", "mia"),
        ] {
            assert!(includes(wanted, inside), "{wanted} {inside}");
            assert!(outside.is_empty() || !includes(wanted, outside), "{wanted} {outside}");
        }
        assert!(includes("my-region", "my-region") && !includes("apac", "my-region"));
    }
}

use super::*;

const PIN: [u8; 32] = [7; 32];

fn now() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000)
}

fn node(name: &str) -> NodeName {
    name.parse().unwrap()
}

fn services(names: &[&str]) -> BTreeSet<ServiceName> {
    names.iter().map(|name| name.parse().unwrap()).collect()
}

fn grant() -> JoinGrant {
    JoinGrant {
        node: node("web-17"),
        services: services(&["orders", "web"]),
        network: None,
        labels: Default::default(),
    }
}

const HOST: &str = "10.0.1.17";

struct Joining {
    ledger: TokenLedger,
    token: JoinToken,
}

impl Joining {
    fn with(grant: JoinGrant) -> Joining {
        let mut ledger = TokenLedger::default();
        let token = ledger.create(grant, Duration::from_secs(600), PIN, now()).unwrap();
        Joining { ledger, token }
    }

    fn redeem(
        &mut self,
        node_name: &str,
        names: &[&str],
        address: &str,
        at: u64,
    ) -> Result<JoinGrant, String> {
        let at = now() + Duration::from_secs(at);
        let address = address.parse().unwrap();
        let redeemed = self.ledger.redeem(&self.token, &node(node_name), &services(names), address, at);
        redeemed.map_err(|refusal| refusal.to_string().replace(&self.token.id.to_string(), "ID"))
    }
}

#[test]
fn a_token_is_redeemed_once() {
    let mut joining = Joining::with(grant());
    assert_eq!(joining.redeem("web-17", &["orders"], HOST, 599), Ok(grant()));
    let reused = "token ID was redeemed before, by web-17 from 10.0.1.17: one of the two copied it";
    assert_eq!(joining.redeem("web-17", &["orders"], "10.0.9.9", 599), Err(reused.to_owned()));
    // The ledger that was saved knows of it, too.
    let records = joining.ledger.records().map(|(id, record)| (id, record.clone()));
    joining.ledger = TokenLedger::from_records(records.collect::<Vec<_>>());
    assert_eq!(joining.redeem("web-17", &["orders"], HOST, 600), Err(reused.to_owned()));
}

#[test]
fn a_token_that_is_refused_for_its_node_is_not_used_up() {
    let network = Some("10.0.1.0/24".parse().unwrap());
    let mut joining = Joining::with(JoinGrant { network, ..grant() });
    for (name, names, address, why) in [
        ("web-18", &["orders"][..], HOST, "token ID is for the node `web-17`, and `web-18` presented it"),
        ("web-17", &["orders", "payments"], HOST, "token ID does not allow the service `payments`"),
        (
            "web-17",
            &[],
            "10.0.2.17",
            "token ID is for nodes in 10.0.1.0/24, and was presented from 10.0.2.17",
        ),
    ] {
        assert_eq!(joining.redeem(name, names, address, 1), Err(why.to_owned()));
    }
    assert!(joining.redeem("web-17", &[], "::ffff:10.0.1.17", 1).is_ok());
}

#[test]
fn a_token_expires() {
    let mut joining = Joining::with(grant());
    let expired = "token ID has expired; create another one with `vmeshctl token create`";
    assert_eq!(joining.redeem("web-17", &[], HOST, 600), Err(expired.to_owned()));
}

#[test]
fn an_address_that_guesses_is_refused_even_with_a_right_token_until_a_minute_is_over() {
    let mut joining = Joining::with(grant());
    let right = joining.token.clone();
    joining.token.secret[0] ^= 1;
    for _ in 0..MAX_GUESSES {
        let wrong = Err("token ID was presented with a wrong secret".to_owned());
        assert_eq!(joining.redeem("web-17", &[], "10.6.6.6", 1), wrong);
    }
    joining.token = right;
    let guesses = Err("10.6.6.6 presented more than 10 wrong tokens in a minute".to_owned());
    assert_eq!(joining.redeem("web-17", &[], "10.6.6.6", 2), guesses);
    // Other addresses are not affected. A minute later, the guesser's address is accepted again.
    joining.token.id.0[0] ^= 1;
    let unknown =
        Err("token ID is unknown: it was created by another replica, or revoked, or guessed".to_owned());
    assert_eq!(joining.redeem("web-17", &[], HOST, 2), unknown);
    joining.token.id.0[0] ^= 1;
    assert_eq!(joining.redeem("web-17", &[], "10.6.6.6", 62), Ok(grant()));
}

#[test]
fn many_addresses_that_guess_cost_a_bounded_table_and_are_refused_together() {
    let mut joining = Joining::with(grant());
    joining.token.id.0[0] ^= 1;
    for address in 0..2 * MAX_GUESSERS {
        let address = IpAddr::from(std::net::Ipv4Addr::from_bits(0x0a00_0000 + address as u32));
        _ = joining.ledger.redeem(&joining.token, &node("web-17"), &BTreeSet::new(), address, now());
    }
    assert!(joining.ledger.guesses.len() <= MAX_GUESSERS);
    assert!(joining.redeem("web-17", &[], "10.99.0.1", 0).unwrap_err().contains("more than 10 wrong tokens"));
}

#[test]
fn a_token_is_read_as_it_is_written_and_never_printed_by_accident() {
    let token = Joining::with(grant()).token;
    let text = token.reveal();
    assert_eq!(text.len(), 104);
    assert_eq!(text.parse::<JoinToken>().unwrap(), token);
    assert_eq!(format!("{token:?}"), format!("JoinToken {{ id: {}, .. }}", token.id));
    let long = format!("{}x", *text);
    let short = text.trim_end_matches(|c| c != '.').to_owned();
    for wrong in [
        "",
        "vmj1",
        "vmj1.a.b.c",
        "vmj2.a.b.c",
        &text.replacen("vmj1", "vmj2", 1),
        &long,
        &short,
        "x.".repeat(500).as_str(),
    ] {
        assert_eq!(wrong.parse::<JoinToken>(), Err(NotAToken), "{wrong}");
    }
}

/// A ledger with `count` records like that of a fresh token, changed by `change`.
fn crowded(count: usize, change: impl Fn(usize, &mut TokenRecord)) -> TokenLedger {
    let record = Joining::with(grant()).ledger.records().next().unwrap().1.clone();
    let records = (0..count).map(|number| {
        let mut record = record.clone();
        change(number, &mut record);
        (TokenId((number as u64).to_be_bytes()), record)
    });
    TokenLedger::from_records(records)
}

fn create(ledger: &mut TokenLedger, at: u64) -> Result<(), CreateError> {
    ledger.create(grant(), Duration::from_secs(60), PIN, now() + Duration::from_secs(at)).map(drop)
}

#[test]
fn tokens_that_wait_are_bounded_and_old_ones_are_forgotten() {
    let mut ledger = crowded(MAX_TOKENS, |_, _| {});
    assert_eq!(create(&mut ledger, 599), Err(CreateError::Full));
    assert_eq!(create(&mut ledger, 600), Ok(()));
    assert_eq!(create(&mut ledger, 600 + 86_400), Ok(()));
    assert_eq!(ledger.records().count(), 2);
    for lifetime in [Duration::ZERO, MAX_LIFETIME + Duration::from_secs(1)] {
        assert_eq!(ledger.create(grant(), lifetime, PIN, now()).map(drop), Err(CreateError::Lifetime));
    }
}

#[test]
fn redeemed_tokens_are_bounded_too_and_those_that_expire_first_go_first() {
    let mut ledger = crowded(MAX_RECORDS, |number, record| {
        record.redeemed = Some(Redemption { at: now(), from: HOST.parse().unwrap() });
        record.expires = now() + Duration::from_secs(1 + (MAX_RECORDS - number) as u64);
    });
    assert_eq!(create(&mut ledger, 0), Ok(()));
    assert_eq!(ledger.records().count(), MAX_RECORDS);
    let last = TokenId((MAX_RECORDS as u64 - 1).to_be_bytes());
    assert!(ledger.records().all(|(id, _)| id != last));
}

#[test]
fn a_revoked_token_is_unknown_and_a_redeemed_one_stays_on_record() {
    let mut joining = Joining::with(grant());
    let id = joining.token.id;
    assert!(joining.ledger.revoke(id).is_some());
    assert!(joining.redeem("web-17", &[], HOST, 1).unwrap_err().contains("is unknown"));
    let mut joining = Joining::with(grant());
    joining.redeem("web-17", &[], HOST, 1).unwrap();
    assert!(joining.ledger.revoke(joining.token.id).is_none());
}

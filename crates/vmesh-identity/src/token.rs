//! Join tokens: each lets one node join once.
//!
//! A token is `vmj1.ID.SECRET.PIN`. The control plane that created it keeps the hash of the secret. The pin is the SHA-256 of the root's
//! public key, so that a node that joins knows whom it talks to before it sends the secret.
//!
//! Call [`TokenLedger::create`], and give the token to the node. Call [`TokenLedger::redeem`] when a node presents one. Write the ledger to
//! the disk after both, and before the answer: a token that was redeemed must stay redeemed after a crash.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;
use std::time::{Duration, SystemTime};

use aws_lc_rs::constant_time::verify_slices_are_equal;
use aws_lc_rs::digest::{SHA256, digest};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::{Deserialize, Serialize};
use vmesh_model::{Cidr, Labels, NodeName, ServiceName};
use zeroize::Zeroizing;

const PREFIX: &str = "vmj1";
/// The most bytes of a token's text; a token has 104.
const MAX_TEXT: usize = 256;
/// The most tokens of a ledger that wait to be redeemed.
pub const MAX_TOKENS: usize = 20_000;
/// The most records of a ledger. Of redeemed and expired tokens, those that expire first are forgotten first: the ledger then refuses
/// them as unknown.
const MAX_RECORDS: usize = 2 * MAX_TOKENS;
/// The time for which the ledger keeps redeemed and expired tokens, so that it can tell reuse from guessing.
const REMEMBERED_FOR: Duration = Duration::from_secs(24 * 60 * 60);
/// The most wrong secrets and unknown tokens that one address may present in [`GUESS_WINDOW`].
const MAX_GUESSES: u32 = 10;
const GUESS_WINDOW: Duration = Duration::from_secs(60);
/// The most addresses whose guesses are counted one by one. All others share one count.
const MAX_GUESSERS: usize = 4096;
/// The longest time that a token may be valid.
pub const MAX_LIFETIME: Duration = Duration::from_secs(7 * 24 * 60 * 60);

/// A text that is no join token. The message does not repeat the text, which may be a secret.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "this is not a join token: it has the form `vmj1.ID.SECRET.PIN`, as `vmeshctl token create` prints it"
)]
pub struct NotAToken;

/// A join token with its secret, as a node presents it. Its `Debug` output has no secret.
#[derive(Clone, PartialEq, Eq)]
pub struct JoinToken {
    pub id: TokenId,
    secret: Zeroizing<[u8; 32]>,
    /// The SHA-256 of the root's public key.
    pub pin: [u8; 32],
}

impl JoinToken {
    /// Returns the text of the token, secret included.
    pub fn reveal(&self) -> Zeroizing<String> {
        let encode = |bytes: &[u8]| URL_SAFE_NO_PAD.encode(bytes);
        let secret = Zeroizing::new(encode(&*self.secret));
        Zeroizing::new(format!("{PREFIX}.{}.{}.{}", self.id, *secret, encode(&self.pin)))
    }
}

impl FromStr for JoinToken {
    type Err = NotAToken;

    fn from_str(text: &str) -> Result<Self, NotAToken> {
        if text.len() > MAX_TEXT {
            return Err(NotAToken);
        }
        let mut parts = text.split('.');
        let (Some(PREFIX), Some(id), Some(secret), Some(pin), None) =
            (parts.next(), parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(NotAToken);
        };
        fn decode<const N: usize>(text: &str) -> Result<[u8; N], NotAToken> {
            let bytes = Zeroizing::new(URL_SAFE_NO_PAD.decode(text).map_err(|_| NotAToken)?);
            bytes.as_slice().try_into().map_err(|_| NotAToken)
        }
        Ok(JoinToken { id: TokenId(decode(id)?), secret: Zeroizing::new(decode(secret)?), pin: decode(pin)? })
    }
}

impl fmt::Debug for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JoinToken").field("id", &self.id).finish_non_exhaustive()
    }
}

/// The public name of a token.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TokenId([u8; 8]);

impl fmt::Display for TokenId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&URL_SAFE_NO_PAD.encode(self.0))
    }
}

impl fmt::Debug for TokenId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for TokenId {
    type Err = NotAToken;

    fn from_str(text: &str) -> Result<Self, NotAToken> {
        let bytes = URL_SAFE_NO_PAD.decode(text).map_err(|_| NotAToken)?;
        bytes.as_slice().try_into().map(TokenId).map_err(|_| NotAToken)
    }
}

/// The rights that a token gives to the node that redeems it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JoinGrant {
    pub node: NodeName,
    /// The services that the node may run.
    pub services: BTreeSet<ServiceName>,
    /// Labels that the node has whatever it reports.
    #[serde(default, skip_serializing_if = "Labels::is_empty")]
    pub labels: Labels,
    /// The network that the node must connect from; any if it is `None`.
    pub network: Option<Cidr>,
}

/// The reason why a token was not created.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CreateError {
    #[error(
        "{MAX_TOKENS} tokens are waiting to be redeemed: remove some with `vmeshctl token revoke`, or wait until they expire"
    )]
    Full,
    #[error("a token is valid for more than 0 s and at most {} days", MAX_LIFETIME.as_secs() / 86_400)]
    Lifetime,
    #[error("could not get random bytes from the operating system")]
    Random,
}

/// The reason why a node may not join. The node is told [`JoinRefusal::public`] alone.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum JoinRefusal {
    #[error("token {0} is unknown: it was created by another replica, or revoked, or guessed")]
    Unknown(TokenId),
    #[error("token {0} was presented with a wrong secret")]
    WrongSecret(TokenId),
    #[error("token {id} was redeemed before, by {node} from {address}: one of the two copied it")]
    Reused { id: TokenId, node: NodeName, address: IpAddr },
    #[error("token {0} has expired; create another one with `vmeshctl token create`")]
    Expired(TokenId),
    #[error("token {id} is for the node `{expected}`, and `{found}` presented it")]
    WrongNode { id: TokenId, expected: NodeName, found: NodeName },
    #[error("token {id} does not allow the service `{service}`")]
    ServiceNotGranted { id: TokenId, service: ServiceName },
    #[error("token {id} is for nodes in {network}, and was presented from {address}")]
    WrongNetwork { id: TokenId, network: Cidr, address: IpAddr },
    #[error("{0} presented more than {MAX_GUESSES} wrong tokens in a minute")]
    TooManyGuesses(IpAddr),
}

impl JoinRefusal {
    /// Returns what the node is told: not enough for a thief or a guesser to learn anything.
    pub fn public(&self) -> &'static str {
        match self {
            JoinRefusal::Expired(_) => {
                "the token has expired; create another one with `vmeshctl token create`"
            }
            JoinRefusal::WrongNode { .. } | JoinRefusal::ServiceNotGranted { .. } => {
                "the token is not for this node and its services; compare `node.name` and `workloads` with `vmeshctl token list`"
            }
            JoinRefusal::TooManyGuesses(_) => "too many attempts; try again in a minute",
            JoinRefusal::Unknown(_)
            | JoinRefusal::WrongSecret(_)
            | JoinRefusal::Reused { .. }
            | JoinRefusal::WrongNetwork { .. } => {
                "the token is not accepted; the control plane's log says why. A token can be used once, at the replica that created it"
            }
        }
    }
}

/// The record of a token. It has no secret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenRecord {
    /// The SHA-256 of the secret, in base64url.
    hash: String,
    pub grant: JoinGrant,
    pub expires: SystemTime,
    pub redeemed: Option<Redemption>,
}

impl TokenRecord {
    fn is_waiting(&self, now: SystemTime) -> bool {
        self.redeemed.is_none() && self.expires > now
    }
}

/// The use of a token.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Redemption {
    pub at: SystemTime,
    pub from: IpAddr,
}

/// The tokens of one replica. Two replicas share no tokens, so a token is redeemed once in all.
#[derive(Debug, Default)]
pub struct TokenLedger {
    tokens: BTreeMap<TokenId, TokenRecord>,
    guesses: BTreeMap<IpAddr, Guesses>,
    guesses_of_others: Guesses,
    /// The ids of forgotten records, until the caller takes them.
    forgotten: Vec<TokenId>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Guesses {
    since: Option<SystemTime>,
    count: u32,
}

impl TokenLedger {
    /// Makes a ledger of the records that were saved.
    pub fn from_records(records: impl IntoIterator<Item = (TokenId, TokenRecord)>) -> TokenLedger {
        TokenLedger { tokens: records.into_iter().collect(), ..TokenLedger::default() }
    }

    /// Returns all records, to be listed and saved.
    pub fn records(&self) -> impl Iterator<Item = (TokenId, &TokenRecord)> {
        self.tokens.iter().map(|(id, record)| (*id, record))
    }

    pub fn record(&self, id: TokenId) -> Option<&TokenRecord> {
        self.tokens.get(&id)
    }

    /// Returns the tokens whose records were forgotten since the last call, so that their files can be removed.
    pub fn take_forgotten(&mut self) -> Vec<TokenId> {
        std::mem::take(&mut self.forgotten)
    }

    /// Creates a token for `grant` that expires after `lifetime`. `pin` is the SHA-256 of the root's public key.
    pub fn create(
        &mut self,
        grant: JoinGrant,
        lifetime: Duration,
        pin: [u8; 32],
        now: SystemTime,
    ) -> Result<JoinToken, CreateError> {
        if lifetime.is_zero() || lifetime > MAX_LIFETIME {
            return Err(CreateError::Lifetime);
        }
        self.forget_old(now);
        if self.tokens.len() >= MAX_TOKENS && self.waiting(now) >= MAX_TOKENS {
            return Err(CreateError::Full);
        }
        let (mut id, mut secret) = ([0; 8], Zeroizing::new([0; 32]));
        for bytes in [id.as_mut_slice(), secret.as_mut_slice()] {
            aws_lc_rs::rand::fill(bytes).map_err(|_| CreateError::Random)?;
        }
        let id = TokenId(id);
        let record = TokenRecord { hash: hash(&*secret), grant, expires: now + lifetime, redeemed: None };
        self.tokens.insert(id, record);
        Ok(JoinToken { id, secret, pin })
    }

    /// Redeems a token for `node`, which wants to run `services` and connects from `address`. A token that is refused for its node, its
    /// services or its network is not used up; the guesses of an address are counted.
    pub fn redeem(
        &mut self,
        token: &JoinToken,
        node: &NodeName,
        services: &BTreeSet<ServiceName>,
        address: IpAddr,
        now: SystemTime,
    ) -> Result<JoinGrant, JoinRefusal> {
        let id = token.id;
        if self.guesses(address, now).count >= MAX_GUESSES {
            return Err(JoinRefusal::TooManyGuesses(address));
        }
        let Some(record) = self.tokens.get_mut(&id) else {
            self.guesses(address, now).count += 1;
            return Err(JoinRefusal::Unknown(id));
        };
        let (presented, expected) = (hash(&*token.secret), record.hash.as_bytes());
        if verify_slices_are_equal(presented.as_bytes(), expected).is_err() {
            self.guesses(address, now).count += 1;
            return Err(JoinRefusal::WrongSecret(id));
        }
        if let Some(earlier) = &record.redeemed {
            return Err(JoinRefusal::Reused { id, node: record.grant.node.clone(), address: earlier.from });
        }
        if record.expires <= now {
            return Err(JoinRefusal::Expired(id));
        }
        if record.grant.node != *node {
            let (expected, found) = (record.grant.node.clone(), node.clone());
            return Err(JoinRefusal::WrongNode { id, expected, found });
        }
        if let Some(service) = services.difference(&record.grant.services).next() {
            return Err(JoinRefusal::ServiceNotGranted { id, service: service.clone() });
        }
        if let Some(network) = record.grant.network
            && !network.contains(address.to_canonical())
        {
            return Err(JoinRefusal::WrongNetwork { id, network, address });
        }
        record.redeemed = Some(Redemption { at: now, from: address });
        Ok(record.grant.clone())
    }

    /// Counts a text that is no token as a guess of `address`. Refuses an address that has guessed too often.
    pub fn on_malformed(&mut self, address: IpAddr, now: SystemTime) -> Result<(), JoinRefusal> {
        let guesses = self.guesses(address, now);
        guesses.count = guesses.count.saturating_add(1);
        if guesses.count > MAX_GUESSES { Err(JoinRefusal::TooManyGuesses(address)) } else { Ok(()) }
    }

    /// Removes a token that was not redeemed. Returns its record.
    pub fn revoke(&mut self, id: TokenId) -> Option<TokenRecord> {
        self.tokens.get(&id)?.redeemed.is_none().then(|| self.tokens.remove(&id))?
    }

    /// Counts the tokens that can be redeemed.
    fn waiting(&self, now: SystemTime) -> usize {
        self.tokens.values().filter(|record| record.is_waiting(now)).count()
    }

    /// Forgets the tokens that expired long ago, and makes room for one more record.
    fn forget_old(&mut self, now: SystemTime) {
        let is_recent = |at: SystemTime| now.duration_since(at).unwrap_or_default() < REMEMBERED_FOR;
        let old = self.tokens.iter().filter(|(_, record)| !is_recent(record.expires)).map(|(id, _)| *id);
        let mut old: Vec<TokenId> = old.collect();
        old.iter().for_each(|id| _ = self.tokens.remove(id));
        if self.tokens.len() >= MAX_RECORDS {
            let remembered = self.tokens.iter().filter(|(_, record)| !record.is_waiting(now));
            let oldest = remembered.min_by_key(|(_, record)| record.expires).map(|(id, _)| *id);
            if let Some(id) = oldest {
                self.tokens.remove(&id);
                old.push(id);
            }
        }
        self.forgotten.extend(old);
    }

    fn guesses(&mut self, address: IpAddr, now: SystemTime) -> &mut Guesses {
        let is_over = |since: SystemTime| now.duration_since(since).map_or(true, |age| age >= GUESS_WINDOW);
        if self.guesses.len() >= MAX_GUESSERS && !self.guesses.contains_key(&address) {
            self.guesses.retain(|_, guesses| guesses.count > 0 && !guesses.since.is_none_or(is_over));
        }
        let guesses = match self.guesses.len() < MAX_GUESSERS || self.guesses.contains_key(&address) {
            true => self.guesses.entry(address).or_default(),
            false => &mut self.guesses_of_others,
        };
        if guesses.since.is_none_or(is_over) {
            *guesses = Guesses { since: Some(now), count: 0 };
        }
        guesses
    }
}

fn hash(secret: &[u8]) -> String {
    URL_SAFE_NO_PAD.encode(digest(&SHA256, secret))
}

#[cfg(test)]
mod tests;

//! The text form of values in configuration: durations with a unit, and one value or a list of values.

use std::fmt;
use std::marker::PhantomData;
use std::time::Duration;

use serde::de::{self, Deserialize, Deserializer, SeqAccess, Visitor};

/// Parses a duration such as `250ms`, `2s`, `1m30s` or `1.5s`. A unit is required.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("`{text}` is not a duration: a number and a unit, such as 250ms, 2s, 1m30s or 1h");
    let mut rest = text.trim();
    let mut nanos: u128 = 0;
    if rest.is_empty() {
        return Err(wrong());
    }
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.').ok_or_else(wrong)?;
        let (number, tail) = rest.split_at(digits);
        let letters = tail.find(|c: char| !c.is_ascii_alphabetic()).unwrap_or(tail.len());
        let (unit, tail) = tail.split_at(letters);
        let unit: u128 = match unit {
            "us" => 1_000,
            "ms" => 1_000_000,
            "s" => 1_000_000_000,
            "m" => 60_000_000_000,
            "h" => 3_600_000_000_000,
            "d" => 86_400_000_000_000,
            _ => return Err(wrong()),
        };
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        if whole.is_empty() || fraction.contains('.') || whole.len() > 12 || fraction.len() > 9 {
            return Err(wrong());
        }
        nanos += whole.parse::<u128>().map_err(|_| wrong())? * unit;
        if !fraction.is_empty() {
            let scale = 10u128.pow(u32::try_from(fraction.len()).map_err(|_| wrong())?);
            nanos += fraction.parse::<u128>().map_err(|_| wrong())? * unit / scale;
        }
        rest = tail;
    }
    // Envoy rejects timeouts beyond protobuf's range. Ten years is longer than any sensible timeout.
    if nanos > 3650 * 86_400_000_000_000 {
        return Err(format!("`{text}` is longer than ten years"));
    }
    u64::try_from(nanos).map(Duration::from_nanos).map_err(|_| wrong())
}

/// Formats a duration so that [`parse_duration`] can parse it, in the largest unit that is exact.
pub fn show_duration(value: Duration) -> String {
    let nanos = value.as_nanos();
    for (unit, size) in
        [("h", 3_600_000_000_000), ("m", 60_000_000_000), ("s", 1_000_000_000), ("ms", 1_000_000)]
    {
        if nanos >= size && nanos.is_multiple_of(size) {
            return format!("{}{unit}", nanos / size);
        }
    }
    if nanos == 0 { "0s".to_owned() } else { format!("{}us", nanos / 1_000) }
}

/// A positive duration in a document. A timeout of zero would fail every request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Time(pub Duration);

impl fmt::Display for Time {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&show_duration(self.0))
    }
}

impl<'de> Deserialize<'de> for Time {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        match parse_duration(&text) {
            Ok(Duration::ZERO) => Err(de::Error::custom(format!("`{text}` is no time at all: leave it out"))),
            Ok(value) => Ok(Time(value)),
            Err(wrong) => Err(de::Error::custom(wrong)),
        }
    }
}

/// Deserializes one value or a list of values: `method: GET`, `method: [GET, HEAD]`.
pub fn one_or_many<'de, D, T>(deserializer: D) -> Result<Vec<T>, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de>,
{
    struct OneOrMany<T>(PhantomData<T>);

    impl<'de, T: Deserialize<'de>> Visitor<'de> for OneOrMany<T> {
        type Value = Vec<T>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("one value or a list of values")
        }

        fn visit_str<E: de::Error>(self, text: &str) -> Result<Vec<T>, E> {
            Ok(vec![T::deserialize(de::value::StrDeserializer::new(text))?])
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Vec<T>, A::Error> {
            let mut all = Vec::new();
            while let Some(one) = seq.next_element()? {
                all.push(one);
            }
            Ok(all)
        }
    }

    deserializer.deserialize_any(OneOrMany(PhantomData))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_duration_prints_as_it_is_written() {
        for text in ["250ms", "2s", "90s", "1h", "1500us", "3m"] {
            let parsed = parse_duration(text).unwrap();
            assert_eq!(parse_duration(&show_duration(parsed)).unwrap(), parsed);
        }
        assert_eq!(parse_duration("1m30s").unwrap(), Duration::from_secs(90));
        assert_eq!(parse_duration("1.5s").unwrap(), Duration::from_millis(1500));
    }

    #[test]
    fn a_duration_without_a_unit_is_an_error() {
        for bad in ["", "5", "s", "-1s", "1 s", "1.2.3s", "5y", ".5s", "9999999999d"] {
            assert!(parse_duration(bad).is_err(), "{bad:?} was taken for a duration");
        }
    }
}

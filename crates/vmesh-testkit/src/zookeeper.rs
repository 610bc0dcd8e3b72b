//! Real ZooKeeper servers: one or more, current and old, which tests can kill, stop and restart.
//!
//! Each server has its own address and the standard ports (2181, 2281 for TLS). The servers run from Debian's
//! packages, which are identified by their hashes, on the machine's Java.

mod client;

use std::fmt::Write as _;
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::ops::{Deref, DerefMut};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

pub use client::{Client, Kind};

use crate::debian::{self, Deb};
use crate::place::{Loopback, TempDir, tempdir};
use crate::process::Daemon;
use crate::servers::{Servers, TlsFiles};
use crate::{Failed, Result, cache, wait_for};

const CLIENT_PORT: u16 = 2181;
const SECURE_PORT: u16 = 2281;
/// The time limit of a start on a busy machine, with a JVM and an election.
const SERVING: Duration = Duration::from_secs(60);
const INSTALL: &str = "it needs Java: `apt-get install openjdk-17-jre-headless`";

/// The version of the servers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version {
    /// 3.8.0, of Debian 12.
    V3_8,
    /// 3.4.13, of Debian 11: without persistent watches, containers and `create2`.
    V3_4,
}

const V3_8: &[Deb] = &[
    Deb {
        path: "pool/main/z/zookeeper/libzookeeper-java_3.8.0-11+deb12u2_all.deb",
        sha256: "b2976f2bb4352d01713d3e40a8e047a3219c05f5fa53054e050246a6bc179053",
    },
    Deb {
        path: "pool/main/libs/libslf4j-java/libslf4j-java_1.7.32-1_all.deb",
        sha256: "38166cb6ec4a956b1f45f5baf18a115fd692c7fe0318b7cb332c4caaa7375f4e",
    },
    Deb {
        path: "pool/main/libc/libcommons-cli-java/libcommons-cli-java_1.5.0-1_all.deb",
        sha256: "6307cc25286cf9c1afdcc16c1215534203aadc7a58e0f6103734d1ccc3da7f65",
    },
    Deb {
        path: "pool/main/d/dropwizard-metrics/libdropwizard-metrics-java_3.2.6-1_all.deb",
        sha256: "2597703fc3f830534184c71ca2749e0c819fd7a724c7603e3b6264a5fb336a37",
    },
    Deb {
        path: "pool/main/s/snappy-java/libsnappy-java_1.1.8.3-1_all.deb",
        sha256: "529cb792389534224ba1513d55ba2c2af287c44cdf1dc8ec2d3b44474cce27d7",
    },
    Deb {
        path: "pool/main/n/netty/libnetty-java_4.1.48-7+deb12u2_all.deb",
        sha256: "a8368dfd04f0dc8f6c9234fd99069106a9be0a60f7a71e6d212ab7629cd1e1a3",
    },
    Deb {
        path: "pool/main/n/netty-tcnative/libnetty-tcnative-java_2.0.28-1_all.deb",
        sha256: "da71f6b0146183a3526188017720dfb42ec3901edd9db7daacc657fb05c2fa5b",
    },
];
const V3_8_JARS: &[&str] = &[
    "zookeeper",
    "zookeeper-jute",
    "slf4j-api",
    "slf4j-simple",
    "commons-cli",
    "metrics-core",
    "snappy-java",
    "netty-buffer",
    "netty-codec",
    "netty-common",
    "netty-handler",
    "netty-resolver",
    "netty-transport",
    "netty-transport-native-unix-common",
    "netty-transport-native-epoll",
    "netty-tcnative",
];

const V3_4: &[Deb] = &[
    Deb {
        path: "pool/main/z/zookeeper/libzookeeper-java_3.4.13-6+deb11u1_all.deb",
        sha256: "9c4ab50e6d8fef7cd21b4d0a68d1bca1aea93e59022c806f1857504565e4b79d",
    },
    Deb {
        path: "pool/main/a/apache-log4j1.2/liblog4j1.2-java_1.2.17-10+deb11u1_all.deb",
        sha256: "05e48f24a5b7d0f8c3743a817a34f8cb93a1137b4a9ffec8614878ec79276646",
    },
    Deb {
        path: "pool/main/libs/libslf4j-java/libslf4j-java_1.7.30-1_all.deb",
        sha256: "c37ffc17158b4b127b39df1a3f36a7f6d8a39f72d8d16c8bbd66bd111947bb22",
    },
];
const V3_4_JARS: &[&str] = &["zookeeper", "slf4j-api", "slf4j-simple", "log4j-1.2"];

impl Version {
    fn classpath(self) -> Result<String> {
        let (name, debs, jars) = match self {
            Version::V3_8 => ("zookeeper-3.8.0", V3_8, V3_8_JARS),
            Version::V3_4 => ("zookeeper-3.4.13", V3_4, V3_4_JARS),
        };
        let dir = debian::unpacked(name, debs)?.join("usr/share/java");
        let jars: Vec<_> =
            jars.iter().map(|jar| dir.join(format!("{jar}.jar")).display().to_string()).collect();
        Ok(jars.join(":"))
    }
}

/// The configuration of the servers.
#[derive(Debug, Clone)]
pub struct Options {
    pub version: Version,
    pub servers: usize,
    /// Opens a TLS port that asks for a client certificate: see [`ZooKeeper::tls`].
    pub tls: bool,
    /// Requires SASL DIGEST-MD5 with this user and password for all requests.
    pub sasl: Option<(&'static str, &'static str)>,
    /// Lets a server without a quorum answer reads of clients that accept this, in sessions that only this
    /// server knows. 3.8 opens no other sessions in that state.
    pub read_only: bool,
}

impl Default for Options {
    fn default() -> Self {
        Options { version: Version::V3_8, servers: 1, tls: false, sasl: None, read_only: false }
    }
}

/// A single server or an ensemble.
pub struct ZooKeeper {
    options: Options,
    classpath: String,
    servers: Servers,
    dir: TempDir,
}

impl Deref for ZooKeeper {
    type Target = Servers;
    fn deref(&self) -> &Servers {
        &self.servers
    }
}

impl DerefMut for ZooKeeper {
    fn deref_mut(&mut self) -> &mut Servers {
        &mut self.servers
    }
}

impl ZooKeeper {
    /// Starts one server of the current version.
    pub async fn one() -> Result<ZooKeeper> {
        ZooKeeper::start(Options::default()).await
    }

    /// Starts three servers of the current version.
    pub async fn three() -> Result<ZooKeeper> {
        ZooKeeper::start(Options { servers: 3, ..Options::default() }).await
    }

    /// Starts the servers and waits until all of them serve.
    pub async fn start(options: Options) -> Result<ZooKeeper> {
        let classpath = options.version.classpath()?;
        let dir = tempdir()?;
        let servers = Servers::new("ZooKeeper", options.servers, &dir)?;
        let mut zookeeper = ZooKeeper { options, classpath, servers, dir };
        if zookeeper.options.tls {
            zookeeper.make_certificates()?;
        }
        for index in 0..zookeeper.servers.len() {
            zookeeper.configure(index)?;
            zookeeper.launch(index)?;
        }
        for index in 0..zookeeper.servers.len() {
            zookeeper.wait_serving(index).await?;
        }
        Ok(zookeeper)
    }

    fn configure(&self, index: usize) -> Result<()> {
        let member = self.servers.server(index)?;
        let ip = member.place.ip();
        let data = member.dir.join("data");
        make(&data)?;
        let mut config = format!(
            "tickTime=200\ninitLimit=50\nsyncLimit=25\ndataDir={}\nclientPort={CLIENT_PORT}\nclientPortAddress={ip}\n\
             minSessionTimeout=400\nmaxSessionTimeout=3600000\nmaxClientCnxns=0\nadmin.enableServer=false\n\
             4lw.commands.whitelist=*\n",
            data.display()
        );
        if self.servers.len() > 1 {
            for (number, member) in self.servers.iter().enumerate() {
                _ = writeln!(config, "server.{}={}:2888:3888", number + 1, member.place);
            }
            write(&data.join("myid"), &(index + 1).to_string())?;
        }
        if self.options.tls {
            let file = |name: &str| self.dir.join(name).display().to_string();
            _ = write!(
                config,
                "secureClientPort={SECURE_PORT}\nsecureClientPortAddress={ip}\nssl.keyStore.location={}\n\
                 ssl.keyStore.type=PEM\nssl.trustStore.location={}\nssl.trustStore.type=PEM\nssl.clientAuth=need\n",
                file("server.pem"),
                file("ca.pem")
            );
        }
        if self.options.read_only {
            config += "localSessionsEnabled=true\nlocalSessionsUpgradingEnabled=true\n";
        }
        if let Some((user, password)) = self.options.sasl {
            config += "authProvider.sasl=org.apache.zookeeper.server.auth.SASLAuthenticationProvider\n\
                       enforce.auth.enabled=true\nenforce.auth.schemes=sasl\n";
            let login = format!(
                "Server {{\n org.apache.zookeeper.server.auth.DigestLoginModule required user_{user}=\"{password}\";\n}};\n"
            );
            write(&member.dir.join("login.conf"), &login)?;
        }
        write(&member.dir.join("zoo.cfg"), &config)
    }

    fn launch(&mut self, index: usize) -> Result<()> {
        let member = self.servers.server(index)?;
        let java =
            debian::on_path("java").ok_or_else(|| Failed::new(format!("found no `java`; {INSTALL}")))?;
        let mut command = Command::new(java);
        command.args(["-Xmx192m", "-Xms32m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Xshare:auto"]);
        // Data need not be synced to the disk, because a test that kills a server does not cut its power.
        command.args([
            "-Dzookeeper.forceSync=no",
            "-Djava.net.preferIPv4Stack=true",
            "-Dzookeeper.skipACL=no",
        ]);
        command.arg(format!("-Dreadonlymode.enabled={}", self.options.read_only));
        if self.options.tls {
            command.arg("-Dzookeeper.serverCnxnFactory=org.apache.zookeeper.server.NettyServerCnxnFactory");
        }
        if self.options.sasl.is_some() {
            let login = member.dir.join("login.conf");
            command.arg(format!("-Djava.security.auth.login.config={}", login.display()));
        }
        command.args(["-cp", &self.classpath, "org.apache.zookeeper.server.quorum.QuorumPeerMain"]);
        command.arg(member.dir.join("zoo.cfg"));
        let daemon = Daemon::spawn(format!("ZooKeeper {index} ({})", member.place), command)?;
        self.servers.started(index, daemon);
        Ok(())
    }

    /// Waits until server `index` answers requests. `srvr` shows that, `ruok` does not.
    pub async fn wait_serving(&mut self, index: usize) -> Result<()> {
        let address = self.address(index)?;
        let asked = async || match ask(address, "srvr").await {
            Ok(answer) if answer.contains("Mode:") => Ok(()),
            Ok(answer) => Err(answer),
            Err(error) => Err(error.to_string()),
        };
        self.servers.wait(index, asked).await
    }

    /// Returns the plaintext address of server `index`.
    pub fn address(&self, index: usize) -> Result<SocketAddr> {
        Ok(SocketAddr::new(self.servers.server(index)?.place.ip(), CLIENT_PORT))
    }

    /// Returns the connect string for clients: `127.1.2.3:2181,127.1.2.4:2181`.
    pub fn connect(&self) -> String {
        self.all(CLIENT_PORT)
    }

    /// Returns the connect string with the TLS ports.
    pub fn secure_connect(&self) -> String {
        self.all(SECURE_PORT)
    }

    fn all(&self, port: u16) -> String {
        let all: Vec<_> = self.servers.iter().map(|member| format!("{}:{port}", member.place)).collect();
        all.join(",")
    }

    /// Returns the files that a client of the TLS ports needs.
    pub fn tls(&self) -> TlsFiles {
        let file = |name: &str| self.dir.join(name);
        TlsFiles { ca: file("ca.pem"), cert: file("client.pem"), key: file("client.key") }
    }

    /// Connects a test client to server `index` once the server has a quorum: right after the end of its
    /// leader, a server may still claim to serve. Without requests, the session lasts for an hour.
    pub async fn client(&self, index: usize) -> Result<Client> {
        let address = self.address(index)?;
        let lasts = Duration::from_secs(3600);
        let what = format!("a session with ZooKeeper {address}");
        wait_for(what, SERVING, async || Client::connect(address, lasts).await).await
    }

    /// Starts server `index` again with its data. The server serves once it has a quorum.
    pub fn launch_again(&mut self, index: usize) -> Result<()> {
        self.servers.kill(index)?;
        self.launch(index)
    }

    /// Starts server `index` again with its data, and waits until it serves.
    pub async fn restart(&mut self, index: usize) -> Result<()> {
        self.launch_again(index)?;
        self.wait_serving(index).await
    }

    /// Starts all servers again without their data.
    pub async fn restart_empty(&mut self) -> Result<()> {
        for index in 0..self.servers.len() {
            self.servers.wipe(index)?;
            self.configure(index)?;
        }
        for index in 0..self.servers.len() {
            self.launch(index)?;
        }
        for index in 0..self.servers.len() {
            self.wait_serving(index).await?;
        }
        Ok(())
    }

    /// Returns the current leader.
    pub async fn leader(&self) -> Result<usize> {
        wait_for("a leader", SERVING, async || {
            for index in 0..self.servers.len() {
                let answer = ask(self.address(index).map_err(|failed| failed.to_string())?, "srvr").await;
                if answer.is_ok_and(|answer| answer.contains("Mode: leader")) {
                    return Ok(index);
                }
            }
            Err("none".to_owned())
        })
        .await
    }

    /// Returns the sessions of the clients that are connected to server `index`, as `cons` lists them.
    pub async fn sessions(&self, index: usize) -> Result<Vec<i64>> {
        let answer = ask(self.address(index)?, "cons").await?;
        let ids = answer.lines().filter_map(|line| {
            let id = line.split("sid=0x").nth(1)?.split(',').next()?;
            u64::from_str_radix(id, 16).ok().map(u64::cast_signed)
        });
        Ok(ids.collect())
    }

    /// Returns the server that holds the connection of `session`.
    pub async fn server_of(&self, session: i64) -> Result<usize> {
        wait_for(format!("session {session:#x} to be connected"), SERVING, async || {
            let mut sessions_seen = Vec::new();
            for index in 0..self.servers.len() {
                match self.sessions(index).await {
                    Ok(sessions) if sessions.contains(&session) => return Ok(index),
                    Ok(sessions) => sessions_seen.push(format!("{sessions:x?}")),
                    Err(failed) => sessions_seen.push(failed.to_string()),
                }
            }
            Err(sessions_seen.join(", "))
        })
        .await
    }

    /// Returns the number of watches on server `index` (`wchs`).
    pub async fn watches(&self, index: usize) -> Result<usize> {
        let answer = ask(self.address(index)?, "wchs").await?;
        let total = answer.lines().find_map(|line| line.strip_prefix("Total watches:")?.trim().parse().ok());
        total.ok_or_else(|| Failed::new(format!("wchs said: {answer}")))
    }

    fn make_certificates(&self) -> Result<()> {
        let addresses: Vec<_> = self.servers.iter().map(|member| format!("IP:{}", member.place)).collect();
        let extensions =
            format!("subjectAltName={}\nextendedKeyUsage=serverAuth,clientAuth\n", addresses.join(","));
        write(&self.dir.join("extensions"), &extensions)?;
        self.openssl(
            &["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "ca.key"],
            &["-out", "ca.pem", "-subj", "/CN=test-ca", "-days", "30"],
        )?;
        for name in ["server", "client"] {
            let (key, request, cert) = (format!("{name}.key"), format!("{name}.csr"), format!("{name}.pem"));
            let subject = format!("/CN=test-{name}");
            self.openssl(
                &["req", "-newkey", "rsa:2048", "-nodes", "-keyout", &key],
                &["-out", &request, "-subj", &subject],
            )?;
            self.openssl(
                &["x509", "-req", "-in", &request, "-CA", "ca.pem", "-CAkey", "ca.key"],
                &["-CAcreateserial", "-days", "30", "-extfile", "extensions", "-out", &cert],
            )?;
        }
        // Java expects the certificate and its key in one file, with the key in PKCS#8, which is what openssl
        // writes.
        let read = |name: &str| {
            let path = self.dir.join(name);
            fs::read_to_string(&path).map_err(Failed::to(format!("could not read {}", path.display())))
        };
        let both = read("server.pem")? + &read("server.key")?;
        write(&self.dir.join("server.pem"), &both)
    }

    fn openssl(&self, args: &[&str], more: &[&str]) -> Result<()> {
        let mut openssl = Command::new("openssl");
        openssl.current_dir(&*self.dir).args(args).args(more);
        cache::run(&mut openssl, "certificates need openssl: `apt-get install openssl`")
    }
}

/// Sends a four-letter word to the server at `address`, and returns its answer.
pub async fn ask(address: SocketAddr, word: &str) -> Result<String> {
    let talk = async {
        let mut stream = TcpStream::connect(address).await?;
        stream.write_all(word.as_bytes()).await?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await?;
        Ok::<_, std::io::Error>(answer)
    };
    let what = format!("could not ask ZooKeeper {address} for `{word}`");
    match timeout(Duration::from_secs(5), talk).await {
        Ok(answer) => answer.map_err(Failed::to(what)),
        Err(_) => Err(Failed::new(format!("{what}: no answer within 5 s"))),
    }
}

/// Returns an address on which nothing listens.
pub fn nowhere() -> Result<(Loopback, String)> {
    let place = Loopback::unique()?;
    let ip: IpAddr = place.ip();
    Ok((place, format!("{ip}:{CLIENT_PORT}")))
}

fn make(dir: &Path) -> Result<()> {
    fs::create_dir_all(dir).map_err(Failed::to(format!("could not create {}", dir.display())))
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).map_err(Failed::to(format!("could not write {}", path.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_server_of_either_age_keeps_what_it_is_told() {
        for version in [Version::V3_8, Version::V3_4] {
            let mut servers = ZooKeeper::start(Options { version, ..Options::default() }).await.unwrap();
            let mut client = servers.client(0).await.unwrap();
            client.make("/a/b", b"one", Kind::Persistent).await.unwrap();
            let name = client.create("/a/c-", b"", Kind::EphemeralSequential).await.unwrap();
            assert_eq!(name, "/a/c-0000000001");
            client.set("/a/b", b"two").await.unwrap();
            assert_eq!(client.get("/a/b").await.unwrap(), b"two");
            assert_eq!(servers.sessions(0).await.unwrap(), [client.session()]);
            servers.restart(0).await.unwrap();
            let mut other = servers.client(0).await.unwrap();
            assert_eq!(other.children("/a").await.unwrap(), ["b", "c-0000000001"]);
            other.delete_all("/a").await.unwrap();
            assert!(other.get("/a").await.is_err());
        }
    }

    #[tokio::test]
    async fn three_servers_have_a_leader() {
        let servers = ZooKeeper::three().await.unwrap();
        let leader = servers.leader().await.unwrap();
        let mut client = servers.client(leader).await.unwrap();
        client.make("/a", b"", Kind::Persistent).await.unwrap();
        assert_eq!(servers.server_of(client.session()).await.unwrap(), leader);
    }
}
